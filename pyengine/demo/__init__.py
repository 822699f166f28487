"""The demo: one real model compressed, saved, loaded and compared with torch, in about a minute."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..environment import machine
from ..progress import track
from .measure import embed, latencies, quality
from .picture import picture
from .sentences import sentences
from .show import table
from .variants import MODEL, WEIGHTS_SHA256, DemoError, Variant, builders, model_folder, require_packages

__all__ = ["DemoError", "picture", "run", "table"]

# sentences, seconds for each shape, fewest rounds
FULL = (400, 10.0, 7)
QUICK = (96, 0.5, 3)


def run(
    output: Path | None, *, threads: int = 1, quick: bool = False, progress: bool | None = None
) -> dict[str, Any]:
    """Measure the variants and return the record: machine, model, sentences, and the variants of the table.

    output: folder for the compressed files, created if needed; None uses a temporary one that is removed.
    threads: of torch and our kernels. Raises DemoError if the [demo] extra is not installed.
    """
    require_packages()
    folder = model_folder()
    count, seconds, min_rounds = QUICK if quick else FULL
    texts = sentences(count)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ExitStack() as stack:
            if output is None:
                output = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyengine-demo-")))
            output.mkdir(parents=True, exist_ok=True)
            made = [build() for _, build in track(builders(folder, output), "models", progress)]
            return _compare(made, texts, seconds, min_rounds, progress)
    finally:
        torch.set_num_threads(before)


def _compare(
    made: list[Variant], texts: list[str], seconds: float, min_rounds: int, progress: bool | None
) -> dict[str, Any]:
    running = [variant for variant in made if variant.model is not None]
    embeddings = embed(running, texts, progress)
    speeds = latencies(running, seconds, min_rounds, progress)
    rows: dict[str, dict[str, Any]] = {
        variant.name: {"name": variant.name, "note": variant.note} for variant in made
    }
    for variant, embedded, speed in zip(running, embeddings, speeds, strict=True):
        for shape, measured in speed.items():
            measured["ratio"] = speeds[0][shape]["median_ms"] / measured["median_ms"]
        rows[variant.name] |= {
            "file_bytes": variant.file_bytes,
            "runtime_bytes": variant.runtime_bytes,
            **quality(embedded, embeddings[0]),
            "latency": speed,
        }
    return {
        "demo": "minilm-l6",
        "model": MODEL,
        "weights_sha256": WEIGHTS_SHA256,
        "sentences": len(texts),
        "machine": machine(),
        "variants": list(rows.values()),
    }
