"""Measures: contenders interleaved in one process, on the same threads, with warm and with cold caches."""

from __future__ import annotations

import functools
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

from .cases import ACTIVATIONS, LinearCase
from .contenders import Call, Contender, exact, relative_error
from .limits import attainable, limits, read_all, touched
from .ours import SCHEMES, ours
from .peers import DEFAULT_PEERS, PEERS
from .peers import contender as peer

# More than the last-level cache of one processor: what is read after so many bytes comes from memory.
COLD_BYTES = 128 * 2**20

# Of a cell's time budget; more rounds show more of the machine's noise, fewer spend less on the clock.
MIN_ROUNDS, MAX_ROUNDS = 7, 30

# Threads of a pool spin after their last work, OpenMP's for 8 ms where measured: until they sleep, they take
# the processor from whoever comes next. On one thread there are none.
SETTLE_SECONDS = 0.01

Record = dict[str, Any]


def run(
    cases: Sequence[LinearCase],
    *,
    schemes: Sequence[str] = SCHEMES,
    peers: Sequence[str] = DEFAULT_PEERS,
    activations: str = "signed",
    threads: int = 1,
    seconds: float = 0.2,
    cold_bytes: int = COLD_BYTES,
    progress: bool | None = None,
) -> list[Record]:
    """One record per case, contender and cache state (warm, cold). README.md lists the fields of a record.

    schemes: of our layers, whose weights are rounded to nearest. peers: of PEERS. activations: of
    ACTIVATIONS. seconds: spent on each contender per case and cache state. cold_bytes: so many bytes of
    others are read before a cold weight is. A contender whose result is wrong has the problem in `check` and
    no speed.

    Takes about 2 * cold_bytes of memory per contender. Raises ValueError for an unknown peer.
    """
    for kind, given, known in (("peer", peers, PEERS), ("activations", [activations], ACTIVATIONS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"{kind} {unknown[0]!r} is none of {', '.join(known)}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return list(_measure(cases, schemes, peers, activations, seconds, cold_bytes, progress))
    finally:
        torch.set_num_threads(before)


def _measure(
    cases: Sequence[LinearCase],
    schemes: Sequence[str],
    peers: Sequence[str],
    activations: str,
    seconds: float,
    cold_bytes: int,
    progress: bool | None,
) -> Iterator[Record]:
    # Weights are built once for all cases that share them.
    ordered = sorted(cases, key=lambda case: (case.k * case.n, case.k, case.m))
    size: tuple[int, int] | None = None
    contenders: list[Contender] = []
    missing: list[tuple[str, str]] = []
    memory, about, found = touched(2 * cold_bytes), machine(), dict[str, float]()
    evict = functools.partial(read_all, memory[:cold_bytes])
    for case in track(ordered, "bench", progress):
        if size != (case.k, case.n):
            size = (case.k, case.n)
            contenders = []  # release the old copies before the new ones are made
            linear = _layer(case)
            contenders, missing = _build(linear, schemes, peers, cold_bytes)
        # A neighbour can lower what is measured, nothing can raise it.
        now = limits(torch.get_num_threads(), memory)
        found = {name: max(value, found.get(name, 0.0)) for name, value in now.items()}
        x = ACTIVATIONS[activations](torch.randn(case.m, case.k, generator=_seeded(case.m)))
        base = {"bench": "linear", "case": case.name, "m": case.m, "k": case.k, "n": case.n}
        same = {"activations": activations, "limits": found, "machine": about}
        for record in _case(case, x, linear, contenders, missing, seconds, evict):
            whole = {**base, **record, **same}
            yield {**whole, **_against_limit(whole, found)}


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _layer(case: LinearCase) -> nn.Linear:
    generator = _seeded(0)
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
            contenders.append(peer(name, linear, cold_bytes))
        except (ImportError, AttributeError, RuntimeError, NotImplementedError) as error:
            missing.append((name, f"not available here: {type(error).__name__}: {error}".splitlines()[0]))
    return contenders, missing


def _case(
    case: LinearCase,
    x: Tensor,
    linear: nn.Linear,
    contenders: Sequence[Contender],
    missing: Sequence[tuple[str, str]],
    seconds: float,
    evict: Call,
) -> Iterator[Record]:
    expected = exact(linear, x)
    checked = [(contender, *_check(contender, x, expected)) for contender in contenders]
    sound = [contender for contender, check, _ in checked if check == "ok"]
    for cache in ("warm", "cold"):
        warm = cache == "warm"
        bound = [each.runtime.bind(x, 1 if warm else each.runtime.copies)[0] for each in sound]
        settle = SETTLE_SECONDS if torch.get_num_threads() > 1 else 0.0
        samples = time_interleaved(bound, seconds, evict=None if warm else evict, settle=settle)
        times = dict(zip((contender.name for contender in sound), samples, strict=True))
        fastest = _fastest_peers(sound, times)
        for contender, check, error in checked:
            yield {
                "cache": cache,
                "contender": contender.name,
                "ours": contender.ours,
                "weights": contender.weights,
                "inputs": contender.inputs,
                "kernel": contender.runtime.kernel,
                "weight_bytes": contender.runtime.weight_bytes,
                "copies": contender.runtime.copies,
                "check": check,
                "relative_error": error,
                **_speed(case, contender, times.get(contender.name)),
                **_ratio(fastest.get(contender.weights), times.get(contender.name)),
                "sequence": contender.sequence,
            }
        for name, reason in missing:
            kind = {"weights": PEERS[name].weights, "inputs": PEERS[name].inputs}
            yield {"cache": cache, "contender": name, "ours": False, **kind, "check": reason, **_NOTHING}


def _check(contender: Contender, x: Tensor, expected: Tensor) -> tuple[str, float | None]:
    """What is wrong with the result, or "ok"; and its relative error, None if that is no number."""
    y = contender.compute(x)
    error = relative_error(y, expected)
    return contender.problem(x, y) or "ok", error if math.isfinite(error) else None


_SPEED_KEYS = ("median_s", "q1_s", "q3_s", "rounds", "gmacs", "weight_gbs")
_OTHER_KEYS = ("kernel", "weight_bytes", "copies", "relative_error", "fastest_peer", "ratio", "sequence")
_NOTHING: Record = dict.fromkeys((*_SPEED_KEYS, *_OTHER_KEYS))


def _speed(case: LinearCase, contender: Contender, times: list[float] | None) -> Record:
    if times is None:
        return dict.fromkeys(_SPEED_KEYS)
    q1, median, q3 = statistics.quantiles(times, n=4)
    speeds = case.m * case.k * case.n / median / 1e9, contender.runtime.weight_bytes / median / 1e9
    return dict(zip(_SPEED_KEYS, (median, q1, q3, len(times), *speeds), strict=True))


def _fastest_peers(
    contenders: Sequence[Contender], times: dict[str, list[float]]
) -> dict[str, tuple[float, str]]:
    """The median and the name, by kind of weights."""
    found: dict[str, tuple[float, str]] = {}
    for each in (each for each in contenders if not each.ours):
        mine = statistics.median(times[each.name]), each.name
        found[each.weights] = min(mine, found.get(each.weights, mine))
    return found


def _ratio(peer: tuple[float, str] | None, times: list[float] | None) -> Record:
    median, name = peer or (None, None)
    ratio = None if median is None or times is None else median / statistics.median(times)
    return {"fastest_peer": name, "ratio": ratio}


def _against_limit(record: Record, found: dict[str, float]) -> Record:
    """limit, limit_gmacs, percent_of_limit."""
    name = value = None
    if record["sequence"] is not None:
        macs = record["m"] * record["k"] * record["n"]
        name, value = attainable(
            found, record["sequence"], macs, record["weight_bytes"], cold=record["cache"] == "cold",
            threads=torch.get_num_threads(),
        )  # fmt: skip
    reached = value is not None and record["gmacs"] is not None
    percent = 100 * record["gmacs"] / value if reached else None
    return {"limit": name, "limit_gmacs": value, "percent_of_limit": percent}


@dataclass
class _Turn:
    """A contender's calls, and which one is next."""

    calls: list[Call]
    repeat: int = 1
    next: int = 0
    times: list[float] = field(default_factory=list)

    def sample(self, evict: Call | None, settle: float) -> float:
        """Seconds per call over `repeat` calls: all on one weight just used, or each on the next weight, once
        `evict` has driven out of the caches what was read before. Calls on the last weight, for `settle`
        seconds and at least once, bring back activations, code and threads.
        """
        if evict is None:
            batch = self.calls[:1] * self.repeat
        else:
            batch = [self.calls[(self.next + i) % len(self.calls)] for i in range(self.repeat)]
            evict()
        last, ready = self.calls[self.next - 1 if evict else 0], time.perf_counter() + settle
        last()
        while time.perf_counter() < ready:
            last()
        self.next = (self.next + self.repeat) % len(self.calls)
        start = time.perf_counter()
        for call in batch:
            call()
        return (time.perf_counter() - start) / self.repeat


def time_interleaved(
    bound: Sequence[list[Call]], seconds: float, *, evict: Call | None, settle: float = 0.0
) -> list[list[float]]:
    """Seconds per call of each contender, one sample per round, the contenders taking turns in every round.

    bound: per contender its calls, each on another copy of the weight; a cold sample uses none twice.
    evict: empties the caches; None: they stay warm, and the first call alone is used. settle: seconds of
    calls that are not on the clock.
    """
    turns = [_Turn(calls) for calls in bound]
    firsts = [min(turn.sample(evict, settle) for _ in range(2)) for turn in turns]
    rounds = int(min(max(seconds / max(firsts, default=1.0), MIN_ROUNDS), MAX_ROUNDS))
    for turn, first in zip(turns, firsts, strict=True):
        turn.repeat = max(1, int(seconds / rounds / first))
        if evict is not None:
            turn.repeat = max(1, min(turn.repeat, len(turn.calls) - 1))
    for _ in range(rounds):
        for turn in turns:
            turn.times.append(turn.sample(evict, settle))
    return [turn.times for turn in turns]
