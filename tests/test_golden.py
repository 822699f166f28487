"""The frozen bytes of every format. tests/golden/make.py made them, once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pyengine import reference
from pyengine.formats import FORMATS, parse_format
from pyengine.packed import PackedWeight

FOLDER = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
ROUNDED = [name for name in NAMES if parse_format(name).encoding in ("int", "uint")]


def read(name):
    """The parts of a golden file as arrays, by the dtypes that FORMAT.md gives them."""
    content = json.loads((FOLDER / f"{name}.json").read_text())
    format = parse_format(name)
    dtypes = {
        "weight": "<f4",
        "qdata": "u1",
        "scale": format.scale_dtype,
        "zero": format.zero_dtype,
        "values": "<f4",
    }
    assert content.keys() == {"format", "shape", *dtypes}
    assert content["format"] == name
    parts = {
        key: None
        if content[key] is None
        else np.array([np.frombuffer(bytes.fromhex(r), dtype) for r in content[key]])
        for key, dtype in dtypes.items()
    }
    assert parts["values"].shape == tuple(content["shape"])
    return format, parts


def test_every_listed_format_is_frozen():
    assert set(FORMATS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_bytes_still_mean_the_same_values(name):
    format, parts = read(name)
    tensors = {
        key: torch.from_numpy(parts[key]) for key in ("qdata", "scale", "zero") if parts[key] is not None
    }
    weight = PackedWeight(format, parts["values"].shape, **tensors)
    assert weight.dequantize().numpy().tobytes() == parts["values"].tobytes()
    codes = reference.unpack_codes(parts["qdata"], format.bits, weight.shape[1])
    values = reference.dequantize(codes, parts["scale"], parts["zero"], format)
    assert values.tobytes() == parts["values"].tobytes()


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_still_gives_the_frozen_bytes(name):
    format, parts = read(name)
    weight = PackedWeight.quantize(torch.from_numpy(parts["weight"]), format)
    assert weight.format == format
    assert {key: t.numpy().tobytes() for key, t in weight.tensors().items()} == {
        key: parts[key].tobytes() for key in ("qdata", "scale", "zero") if parts[key] is not None
    }
    codes, scale, zero = reference.quantize_weight(parts["weight"], format)
    assert reference.pack_codes(codes, format.bits).tobytes() == parts["qdata"].tobytes()
    assert scale.tobytes() == parts["scale"].tobytes()
    assert zero is None or zero.tobytes() == parts["zero"].tobytes()


@pytest.mark.parametrize("name", ROUNDED)
def test_frozen_values_are_within_half_a_step_of_the_frozen_weights(name):
    """The golden bytes are sane by a measure that does not come from the code that made them: int and uint
    values lie on a grid of steps, and zero points are rounded, which shifts the end of the range by half a
    step more."""
    format, parts = read(name)
    size = format.group_size or parts["values"].shape[1]
    step = np.repeat(parts["scale"].astype(np.float64), size, axis=1)[:, : parts["values"].shape[1]]
    error = np.abs(parts["values"].astype(np.float64) - parts["weight"])
    # A stored float16 scale may be smaller than the wanted one by 2**-11 of the range of 2**bits steps.
    half = (1.0 if format.encoding == "uint" else 0.5) + 2.0**format.bits * 2.0**-11
    assert (error <= half * step).all()


def test_one_frozen_row_by_hand():
    """int4: -1.0, -0.9375, ... with scale 1.625 / 7, codes of 4 bits from the lowest up, 8 for zero."""
    _, parts = read("int4")
    assert parts["weight"][0, :4].tolist() == [-1.0, -0.9375, -0.875, -0.8125]
    assert parts["scale"][0] == np.float32(1.625) / np.float32(7)
    by_hand = [8 + round(float(w) / (1.625 / 7)) for w in parts["weight"][0]]
    pairs = zip(by_hand[::2], [*by_hand[1::2], 0], strict=True)
    assert parts["qdata"][0].tolist() == [low + 16 * high for low, high in pairs]
