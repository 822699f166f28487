"""Measures: contenders interleaved in one process, on the same threads, with warm and with cold caches."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyengine.environment import machine
from pyengine.progress import track

from .cases import LinearCase
from .contenders import SCHEMES, Call, Contender, exact, ours, relative_error
from .peers import DEFAULT_PEERS, PEERS

# More than the last-level cache of one processor: what is read after so many bytes comes from memory.
COLD_BYTES = 128 * 2**20

# Of a cell's time budget; more rounds show more of the machine's noise, fewer spend less on the clock.
MIN_ROUNDS, MAX_ROUNDS = 7, 50

Record = dict[str, Any]


def run(
    cases: Sequence[LinearCase],
    *,
    schemes: Sequence[str] = SCHEMES,
    peers: Sequence[str] = DEFAULT_PEERS,
    threads: int = 1,
    seconds: float = 0.2,
    cold_bytes: int = COLD_BYTES,
    progress: bool | None = None,
) -> list[Record]:
    """One record per case, contender and cache state (warm, cold).

    schemes: of our layers, whose weights are rounded to nearest. peers: of PEERS. seconds: spent on each
    contender per case and cache state. cold_bytes: a cold weight is used again only after so many bytes of
    other weights. A record holds median_s, q1_s, q3_s (seconds per call, over rounds), gmacs (10**9
    multiply-accumulates per second), weight_gbs (10**9 weight bytes per second), relative_error (to the float
    weights in float64), ratio (the fastest peer's median / this one's: above 1 is faster than every peer) and
    the machine. A contender whose result is wrong has the problem in `check` and no speed.

    Takes about 6 * cold_bytes of memory. Raises ValueError for an unknown peer.
    """
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise ValueError(f"peer {unknown[0]!r} is none of {', '.join(PEERS)}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return list(_measure(cases, schemes, peers, seconds, cold_bytes, progress))
    finally:
        torch.set_num_threads(before)


def _measure(
    cases: Sequence[LinearCase],
    schemes: Sequence[str],
    peers: Sequence[str],
    seconds: float,
    cold_bytes: int,
    progress: bool | None,
) -> Iterator[Record]:
    # Weights are built once for all cases that share them.
    ordered = sorted(cases, key=lambda case: (case.k * case.n, case.k, case.m))
    size: tuple[int, int] | None = None
    contenders: list[Contender] = []
    missing: list[tuple[str, str]] = []
    about = machine()
    for case in track(ordered, "bench", progress):
        if size != (case.k, case.n):
            size = (case.k, case.n)
            contenders = []  # release the old copies before the new ones are made
            linear = _layer(case)
            contenders, missing = _build(linear, schemes, peers, cold_bytes)
        yield from _case(case, linear, contenders, missing, seconds, about)


def _layer(case: LinearCase) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(case.k, case.n)
    linear.weight.copy_(torch.randn(case.n, case.k, generator=generator) / case.k**0.5)
    linear.bias.copy_(torch.randn(case.n, generator=generator) / 10)
    return linear.requires_grad_(False)


def _build(
    linear: nn.Linear, schemes: Sequence[str], peers: Sequence[str], cold_bytes: int
) -> tuple[list[Contender], list[tuple[str, str]]]:
    """The contenders, and the peers that are not to be had here, with the reason."""
    contenders, missing = list(ours(linear, cold_bytes, schemes)), []
    for name in peers:
        try:
            contenders.append(PEERS[name](linear, cold_bytes))
        except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
            missing.append((name, f"not available here: {type(error).__name__}: {error}".splitlines()[0]))
    return contenders, missing


def _case(
    case: LinearCase,
    linear: nn.Linear,
    contenders: Sequence[Contender],
    missing: Sequence[tuple[str, str]],
    seconds: float,
    about: dict[str, Any],
) -> Iterator[Record]:
    x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(case.m))
    expected = exact(linear, x)
    checked = [(contender, *_check(contender, x, expected)) for contender in contenders]
    for cache in ("warm", "cold"):
        sound = [contender for contender, check, _ in checked if check == "ok"]
        samples = time_interleaved([contender.bind(x) for contender in sound], seconds, warm=cache == "warm")
        times = dict(zip((contender.name for contender in sound), samples, strict=True))
        medians = {c.name: statistics.median(times[c.name]) for c in sound if not c.ours}
        fastest = min(medians, key=lambda name: medians[name], default=None)
        base = {"bench": "linear", "case": case.name, "m": case.m, "k": case.k, "n": case.n, "cache": cache}
        for contender, check, error in checked:
            yield {
                **base,
                "contender": contender.name,
                "ours": contender.ours,
                "kernel": contender.kernel,
                "weight_bytes": contender.weight_bytes,
                "check": check,
                "relative_error": error,
                **_speed(case, contender, times.get(contender.name)),
                "fastest_peer": fastest,
                "ratio": _ratio(medians.get(fastest or ""), times.get(contender.name)),
                "machine": about,
            }
        for name, reason in missing:
            yield {**base, "contender": name, "ours": False, "check": reason, **_NO_SPEED, "machine": about}


def _check(contender: Contender, x: Tensor, expected: Tensor) -> tuple[str, float | None]:
    """What is wrong with the result, or "ok"; and its relative error, None if that is no number."""
    y = contender.compute(x)
    error = relative_error(y, expected)
    return contender.problem(x, y) or "ok", error if math.isfinite(error) else None


_SPEED_KEYS = ("median_s", "q1_s", "q3_s", "rounds", "gmacs", "weight_gbs")
_NO_SPEED: Record = dict.fromkeys((*_SPEED_KEYS, "ratio", "relative_error", "fastest_peer", "kernel"))


def _speed(case: LinearCase, contender: Contender, times: list[float] | None) -> Record:
    if times is None:
        return dict.fromkeys(_SPEED_KEYS)
    q1, median, q3 = statistics.quantiles(times, n=4)
    speeds = case.m * case.k * case.n / median / 1e9, contender.weight_bytes / median / 1e9
    return dict(zip(_SPEED_KEYS, (median, q1, q3, len(times), *speeds), strict=True))


def _ratio(peer: float | None, times: list[float] | None) -> float | None:
    return None if peer is None or times is None else peer / statistics.median(times)


@dataclass
class _Turn:
    """A contender's calls, and which one is next."""

    calls: list[Call]
    repeat: int = 1
    next: int = 0
    times: list[float] = field(default_factory=list)

    def sample(self, warm: bool) -> float:
        """Seconds per call over `repeat` calls: all on one weight just used, or each on the next weight."""
        if warm:
            batch = self.calls[:1] * self.repeat
            batch[0]()
        else:
            batch = [self.calls[(self.next + i) % len(self.calls)] for i in range(self.repeat)]
            self.next = (self.next + self.repeat) % len(self.calls)
        start = time.perf_counter()
        for call in batch:
            call()
        return (time.perf_counter() - start) / self.repeat


def time_interleaved(bound: Sequence[list[Call]], seconds: float, *, warm: bool) -> list[list[float]]:
    """Seconds per call of each contender, one sample per round, the contenders taking turns in every round.

    bound: per contender its calls, each on another copy of the weight; warm uses the first only.
    """
    turns = [_Turn(calls) for calls in bound]
    firsts = [min(turn.sample(warm) for _ in range(2)) for turn in turns]
    rounds = int(min(max(seconds / max(firsts, default=1.0), MIN_ROUNDS), MAX_ROUNDS))
    for turn, first in zip(turns, firsts, strict=True):
        turn.repeat = max(1, int(seconds / rounds / first))
    for _ in range(rounds):
        for turn in turns:
            turn.times.append(turn.sample(warm))
    return [turn.times for turn in turns]
