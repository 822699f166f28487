"""Makes the golden file of each format in pyengine.formats.FORMATS that has none yet.

    python tests/golden/make.py

A file that exists is never touched: its bytes are the promise that a model saved today reads the same in ten
years. Whoever has to break that promise deletes the file by hand and raises FORMAT_VERSION.
"""

import json
from pathlib import Path

import numpy as np

from pyengine import reference
from pyengine.formats import FORMATS

FOLDER = Path(__file__).parent


def lines(array):
    """One string of hexadecimal bytes per row, little-endian."""
    return [row.astype(row.dtype.newbyteorder("<")).tobytes().hex() for row in array]


def weights(k):
    """(3, k) float32: a ramp through zero; noise with outliers; a row that is zero but for one number."""
    rng = np.random.default_rng(2026)
    w = np.zeros((3, k), np.float32)
    w[0] = np.arange(k) * 0.0625 - 1
    w[1] = np.round(rng.standard_normal(k), 3)
    w[1, ::17] *= 5
    w[2, k - 2] = -0.7
    return w


def golden(format):
    k = 133 if format.group_size == 128 else 43
    w = weights(k)
    if format.encoding in ("int", "uint"):
        codes, scale, zero = reference.quantize_weight(w, format)
    else:  # no rounding quantizer: codes at random
        rng = np.random.default_rng(7)
        codes = rng.integers(0, 3 if format.encoding == "ternary" else 2, w.shape).astype(np.uint8)
        groups = np.arange(3 * format.groups(k)).reshape(3, -1)
        scale, zero = (groups * 0.37).astype(format.scale_dtype), None
    return {
        "format": format.name,
        "shape": list(w.shape),
        "weight": lines(w) if format.encoding in ("int", "uint") else None,
        "qdata": lines(reference.pack_codes(codes, format.bits)),
        "scale": lines(scale),
        "zero": None if zero is None else lines(zero),
        "values": lines(reference.dequantize(codes, scale, zero, format)),
    }


if __name__ == "__main__":
    for name, format in FORMATS.items():
        path = FOLDER / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(golden(format), indent=1) + "\n")
            print(f"made {path}")
