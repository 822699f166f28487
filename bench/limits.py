"""What the machine can do at most, measured: multiply-accumulates and bytes per second. See csrc/limits/limits.inc."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor

from pyengine import _C
from pyengine.backends import cpu

# What one thread reads again and again, from the cache of that level.
L2_BYTES, L3_BYTES = 256 * 2**10, 4 * 2**20
# Several walks side by side read faster than one: the best of these counts.
STREAMS = (1, 4, 8)
SAMPLES, BYTES_PER_SAMPLE, ROUNDS_PER_SAMPLE = 7, 2**27, 50_000


def limits(threads: int = 1, memory: Tensor | None = None) -> dict[str, float]:
    """The best of several samples on `threads` threads at once, for the instruction set that layers run on.

    gmacs_*: 10**9 multiply-accumulates per second of the sequences that csrc/limits/limits.inc names; absent
    where it has none for the instruction set. gbs_l2, gbs_l3, gbs_memory, gbs_memory_1_stream: 10**9 bytes read
    per second. memory: what is read, more than the last-level cache holds; by default allocated here.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _measure(threads, _touched() if memory is None else memory)
    finally:
        torch.set_num_threads(before)


def _measure(threads: int, memory: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, index in _table().items():
        if name != "read":
            found[f"gmacs_{name}"] = _best(index, memory[:0], 1, ROUNDS_PER_SAMPLE, threads)
    read = _table()["read"]
    for level, size in (("l2", L2_BYTES), ("l3", L3_BYTES), ("memory", memory.numel())):
        part = memory[: size * threads]
        rounds = max(1, BYTES_PER_SAMPLE // part.numel())
        by_streams = {streams: _best(read, part, streams, rounds, threads) for streams in STREAMS}
        found[f"gbs_{level}"] = max(by_streams.values())
    found["gbs_memory_1_stream"] = by_streams[1]
    return found


def _table() -> dict[str, int]:
    """Indices by name, of the best instruction set that is allowed and has the limit."""
    rows = [(name, isa, index) for _, name, isa, index, _ in _C.limits()]
    return {name: index for each in reversed(cpu.ALLOWED_ISAS) for name, isa, index in rows if isa == each}


def _best(index: int, data: Tensor, streams: int, rounds: int, threads: int) -> float:
    """10**9 bytes or multiply-accumulates per second."""
    best = 0.0
    for _ in range(SAMPLES):
        start = time.perf_counter()
        done = _C.run_limit(index, data.data_ptr(), data.numel(), streams, rounds, threads)
        best = max(best, done / (time.perf_counter() - start))
    return best / 1e9
