"""What the machine can do at most, measured: multiply-accumulates and bytes per second. See csrc/limits/."""

from __future__ import annotations

import functools
import re
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
# Several times what a last-level cache holds.
MEMORY_BYTES = 2**28
SAMPLES, BYTES_PER_SAMPLE, ROUNDS_PER_SAMPLE = 9, 2**26, 500_000


def limits(threads: int = 1, memory: Tensor | None = None) -> dict[str, float]:
    """The best of several samples on `threads` threads at once, for the instruction set that layers run on.

    gmacs_*: 10**9 multiply-accumulates per second of the sequences that csrc/limits/limits.inc names; absent
    where it has none for the instruction set. gbs_l2, gbs_l3, gbs_memory, gbs_memory_1_stream: 10**9 bytes
    read per second. memory: what is read, more than the last-level cache holds; by default allocated here.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _measure(threads, touched(MEMORY_BYTES) if memory is None else memory)
    finally:
        torch.set_num_threads(before)


def touched(size: int) -> Tensor:
    """Bytes that are in memory: pages that nothing has written to would all be the same one."""
    return torch.ones(size, dtype=torch.uint8)


def attainable(
    found: dict[str, float], sequence: str, macs: int, weight_bytes: int, *, cold: bool, threads: int
) -> tuple[str | None, float | None]:
    """The roof: the lower of two limits, its name and 10**9 multiply-accumulates per second. One is what the
    sequence of instructions computes, the other comes of reading the weights once: from memory if cold, else
    what each cache holds at its own speed. None where neither is known.
    """
    where, seconds = _reading(found, weight_bytes, cold, threads)
    candidates = {f"gmacs_{sequence}": found.get(f"gmacs_{sequence}")}
    if where is not None:
        candidates[where] = macs / seconds / 1e9
    known = {name: value for name, value in candidates.items() if value is not None}
    name = min(known, key=lambda each: known[each], default=None)
    return name, known.get(name or "")


def _reading(
    found: dict[str, float], weight_bytes: int, cold: bool, threads: int
) -> tuple[str | None, float]:
    """The farthest place that weights come from, None where the caches are not known, and seconds."""
    caches = (("gbs_l2", threads * cache_bytes(2)), ("gbs_l3", cache_bytes(3)), ("gbs_memory", weight_bytes))
    if not cold and not (caches[0][1] or caches[1][1]):
        return None, 0.0
    left, seconds, where = weight_bytes, 0.0, None
    for name, held in caches[2:] if cold else caches:
        part = min(left, held)
        if part:
            left, seconds, where = left - part, seconds + part / found[name] / 1e9, name
    return where, seconds


@functools.cache
def cache_bytes(level: int) -> int:
    """Of the first processor's cache of that level for data, as Linux tells it; 0 if there is none."""
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, number, size = (_read(folder / name) for name in ("type", "level", "size"))
        match = re.fullmatch(r"(\d+)([KM])", size)
        if kind in ("Data", "Unified") and number == str(level) and match:
            return int(match[1]) * {"K": 2**10, "M": 2**20}[match[2]]
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


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
    found["gbs_memory_1_stream"] = by_streams[1]  # of the memory, which comes last
    return found


def read_all(data: Tensor) -> None:
    """Afterwards the caches hold this, and no more what they held before."""
    _C.run_limit(_table()["read"], data.data_ptr(), data.numel(), 1, 1, 1)


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
