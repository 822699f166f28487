"""Who wins: our layers against the fastest peer of each cell, and every cell that we lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from pyengine.terminal import add, grid

Record = dict[str, Any]

# Kinds of weights that ours have, and what is added to them for peers with dynamic activations.
WEIGHTS = ("int8", "int4")
DYNAMIC = " dynamic"


@dataclass(frozen=True)
class Cell:
    """Two speeds of one case and cache state: ours, and that of the fastest of some peers."""

    ours: Record
    peer: Record

    @property
    def ratio(self) -> float:
        """Above 1: ours is faster."""
        return float(self.peer["median_s"] / self.ours["median_s"])


@dataclass(frozen=True)
class Comparison:
    """One of our contenders with one cache state, against the fastest of the peers that `against` names."""

    contender: str
    cache: str
    against: str
    cells: tuple[Cell, ...]

    @property
    def lost(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.ratio < 1]

    @property
    def mean(self) -> float | None:
        """Geometric, of the ratios."""
        logs = [math.log(cell.ratio) for cell in self.cells]
        return math.exp(sum(logs) / len(logs)) if logs else None


def compare(records: Sequence[Record]) -> list[Comparison]:
    """Each of our contenders against the peers with the same kind of weights, against those of them whose
    activations are dynamic, and against float32. What has no speed takes no part.
    """
    mine = {(r["contender"], r["cache"]): r["weights"] for r in records if r["ours"]}
    found = []
    for (contender, cache), weights in mine.items():
        for against, takes_part in _opponents(weights):
            cells = tuple(_cells(records, contender, cache, takes_part))
            if against == weights or cells:
                found.append(Comparison(contender, cache, against, cells))
    return found


Filter = Callable[[Record], bool]


def _opponents(weights: str) -> Iterator[tuple[str, Filter]]:
    yield weights, lambda r: r["weights"] == weights
    yield weights + DYNAMIC, lambda r: r["weights"] == weights and r["inputs"] == "dynamic"
    yield "fp32", lambda r: r["weights"] == "fp32"


def _cells(records: Sequence[Record], contender: str, cache: str, takes_part: Filter) -> Iterator[Cell]:
    timed = [r for r in records if r["cache"] == cache and r["median_s"] is not None]
    for mine in (r for r in timed if r["ours"] and r["contender"] == contender):
        peers = [r for r in timed if not r["ours"] and _same_case(r, mine) and takes_part(r)]
        if peers:
            yield Cell(mine, min(peers, key=lambda r: float(r["median_s"])))


def _same_case(a: Record, b: Record) -> bool:
    return (a["case"], a["activations"]) == (b["case"], b["activations"])


def largest_error(records: Sequence[Record], contender: str) -> float | None:
    """Of a case, over that of its most accurate peer that takes weights and activations in the same way."""
    quotients = []
    for mine in (r for r in records if r["contender"] == contender and r["relative_error"]):
        errors = [
            r["relative_error"]
            for r in records
            if not r["ours"] and (r["weights"], r["inputs"]) == (mine["weights"], mine["inputs"])
            if _same_case(r, mine) and r["relative_error"]
        ]
        if errors:
            quotients.append(mine["relative_error"] / min(errors))
    return max(quotients, default=None)


def summary(records: Sequence[Record]) -> list[RenderableType]:
    """What to print: the means, then the cells that we lose to a peer with the same kind of weights."""
    comparisons = compare(records)
    means = grid(
        "Speed over the fastest peer's, geometric mean of the cells; largest error over the best peer's",
        ("", "against", "warm", "won", "lost", "cold", "won", "lost", "error"),
        right=("warm", "cold", "won", "lost", "error"),
    )
    rows: dict[tuple[str, str], list[object]] = {}
    for each in comparisons:
        lost = len(each.lost)
        row = rows.setdefault((each.contender, each.against), [])
        row += [_times(each.mean), len(each.cells) - lost, lost]
    for (contender, against), row in rows.items():
        if row == rows.get((contender, against.removesuffix(DYNAMIC))) and against.endswith(DYNAMIC):
            continue  # no static peer is the fastest anywhere
        error = _times(largest_error(records, contender)) if against in WEIGHTS else ""
        add(means, contender.removeprefix("pyengine "), against, *row, error)
    return [means, *_losses(comparisons)]


def _losses(comparisons: Iterable[Comparison]) -> Iterator[RenderableType]:
    shown = grid(
        "Lost cells: peers with the same kind of weights are faster",
        ("", "ratio", "us", "peer", "us of the peer"),
        right=("ratio", "us", "us of the peer"),
    )
    for each in (each for each in comparisons if each.against in WEIGHTS and each.lost):
        shown.add_section()
        shown.add_row(Text(f"{each.contender.removeprefix('pyengine ')}, {each.cache}", style="bold"))
        for cell in each.lost:
            name, (ours, peer) = (
                f"  {cell.ours['case']}",
                (r["median_s"] * 1e6 for r in (cell.ours, cell.peer)),
            )
            add(shown, name, _times(cell.ratio), f"{ours:.1f}", cell.peer["contender"], f"{peer:.1f}")
    if shown.row_count:
        yield shown


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
