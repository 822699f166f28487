"""Records as two pictures: what is reached of the machine's limits, and the speed against peers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .show import where
from .summary import Cell, compare

Record = dict[str, Any]

# Okabe and Ito's colours, which the colour-blind tell apart; markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
PEER = "#8A8A8A"
NEEDED = (
    "case",
    "cache",
    "contender",
    "ours",
    "weights",
    "inputs",
    "activations",
    "median_s",
    "gmacs",
    "limits",
)

ROOFS = {
    "gmacs_fma": "fp32 FMA",
    "gmacs_int16_dot2": "int16 dot2",
    "gmacs_int8_dot4": "int8 dot4",
    "gmacs_int8_pair_sum": "int8 pair sum",
    "gmacs_int4_sum16": "int4 sum16",
}
BANDWIDTHS = {"warm": {"gbs_l2": "L2", "gbs_l3": "L3"}, "cold": {"gbs_memory": "memory"}}
CACHES = ("warm", "cold")


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Of a file that `pyengine bench linear --json` wrote. Raises ValueError for any other."""
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        missing = [key for key in (*NEEDED, "machine") if not isinstance(record, dict) or key not in record]
        if missing:
            raise ValueError(
                f"{path}: line {number} is no record of pyengine bench linear: no {missing[0]!r}"
            )
        records.append(record)
    if not records:
        raise ValueError(f"{path}: no records")
    if len({where([record]) for record in records}) > 1:
        raise ValueError(f"{path}: records of several machines, instruction sets or numbers of threads")
    return records


def plot(records: Sequence[Record], folder: str | os.PathLike[str]) -> list[Path]:
    """Writes roofline.png and speedup.png into the folder, which is made."""
    paths = [Path(folder, name) for name in ("roofline.png", "speedup.png")]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, figure in zip(paths, (roofline(records), speedup(records)), strict=True):
        figure.savefig(path, dpi=150)
    return paths


def _title(what: str, records: Sequence[Record]) -> str:
    about = records[0]["machine"]
    activations = sorted({record["activations"] for record in records})
    return f"{what}\n{where(records)}, {', '.join(activations)} activations, {about['date'][:10]}"


def roofline(records: Sequence[Record]) -> Any:
    """Speed over multiply-accumulates per byte of weights. Ours are the bare kernels; of the peers, the
    fastest of each cell and kind of weights.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    figure.suptitle(_title("Roofline of linear layers", records), fontsize=12)
    kernels = [r for r in records if r["ours"] and r["contender"].endswith(" kernel") and r["gmacs"]]
    names = list(dict.fromkeys(r["contender"] for r in kernels))
    best = {id(cell.peer): cell.peer for each in compare(records) for cell in each.cells}
    for axes, cache in zip(figure.subplots(1, 2, sharey=True), CACHES, strict=True):
        ours = [r for r in kernels if r["cache"] == cache]
        peers = [r for r in best.values() if r["cache"] == cache]
        _roofs(axes, records, cache, {f"gmacs_{r['sequence']}" for r in (*ours, *peers)})
        axes.scatter(
            *_points(peers),
            marker="x",
            s=18,
            linewidths=1,
            color=PEER,
            label="fastest peer of a cell",
            zorder=2,
        )
        for index, name in enumerate(names):
            axes.scatter(
                *_points([r for r in ours if r["contender"] == name]), s=34, zorder=3, linewidths=0.6,
                marker=MARKERS[index % len(MARKERS)], color=COLOURS[index % len(COLOURS)],
                edgecolors="white", label=name.removeprefix("pyengine "),
            )  # fmt: skip
        axes.set_title(f"{cache} caches")
        axes.set_xlabel("multiply-accumulates per byte of weights")
        axes.grid(alpha=0.25, which="major")
    figure.axes[0].set_ylabel("GMAC/s")
    figure.axes[0].legend(loc="lower right", fontsize=9)
    return figure


def _points(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    return [_intensity(r) for r in records], [r["gmacs"] for r in records]


def _intensity(record: Record) -> float:
    return float(record["m"] * record["k"] * record["n"] / record["weight_bytes"])


def _roofs(axes: Any, records: Sequence[Record], cache: str, sequences: set[str]) -> None:
    limits = records[-1]["limits"]
    timed = [r for r in records if r["gmacs"]]
    left, right = (pick(map(_intensity, timed), default=1.0) for pick in (min, max))
    left, right = left / 1.6, right * 4
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    highest = max((limits[name] for name in sequences if name in limits), default=1000.0)
    lowest = min((r["gmacs"] for r in timed), default=1.0)
    axes.set_ylim(lowest / 1.5, highest * 1.6)
    for name, label in BANDWIDTHS[cache].items():
        speed = limits[name]
        end = min(highest / speed, right)
        axes.plot([left, end], [left * speed, end * speed], color="#444444", linewidth=1.2, zorder=1)
        axes.annotate(
            f"{label} {speed:.0f} GB/s", (left, max(left * speed, lowest / 1.5)), xytext=(6, 4),
            textcoords="offset points", fontsize=8, color="#444444", rotation_mode="anchor",
        )  # fmt: skip
    for name, label in ROOFS.items():
        if name in sequences and name in limits:
            axes.axhline(limits[name], color="#444444", linewidth=1.2, linestyle=(0, (6, 3)), zorder=1)
            axes.annotate(
                f"{label} {limits[name]:.0f} GMAC/s", (right, limits[name]), xytext=(-4, 3), ha="right",
                textcoords="offset points", fontsize=8, color="#444444",
            )  # fmt: skip


def speedup(records: Sequence[Record]) -> Any:
    """One map per layer of ours and cache state: M by K x N, in each cell the ratio to the fastest peer with
    the same kind of weights.
    """
    from matplotlib.figure import Figure

    layers = {
        r["contender"]: r["weights"] for r in records if r["ours"] and not r["contender"].endswith(" kernel")
    }
    maps = {
        (each.contender, each.cache): each for each in compare(records) if each.against in layers.values()
    }
    sizes = sorted({(r["k"] * r["n"], r["k"], r["n"]) for r in records})
    rows = sorted({r["m"] for r in records})
    height, width = 0.42 * len(rows) + 1.15, 0.86 * len(sizes) + 1.2
    figure = Figure(figsize=(2 * max(width, 4.2), height * len(layers) + 1), layout="constrained")
    figure.suptitle(
        _title("Speed over that of the fastest peer with the same kind of weights", records), fontsize=12
    )
    grid = figure.subplots(len(layers), 2, squeeze=False)
    for line, (name, weights) in zip(grid, layers.items(), strict=True):
        for axes, cache in zip(line, CACHES, strict=True):
            cells = {(c.ours["m"], c.ours["k"], c.ours["n"]): c for c in maps[name, cache].cells}
            _map(axes, cells, rows, [size[1:] for size in sizes])
            axes.set_title(f"{name.removeprefix('pyengine ')} against {weights} peers, {cache}", fontsize=10)
    return figure


def _map(axes: Any, cells: dict[tuple[int, int, int], Cell], rows: list[int], sizes: list[Any]) -> None:
    """Blue: won. Orange, the number bold: lost. Grey: no speed."""
    logs = [
        [math.log2(cells[(m, *size)].ratio) if (m, *size) in cells else math.nan for size in sizes]
        for m in rows
    ]
    axes.set_facecolor("#DDDDDD")
    axes.imshow(logs, cmap="PuOr", vmin=-2, vmax=2, aspect="auto")
    for i, m in enumerate(rows):
        for j, size in enumerate(sizes):
            cell = cells.get((m, *size))
            lost = cell is not None and cell.ratio < 1
            strong = cell is not None and abs(math.log2(cell.ratio)) > 1.2
            axes.text(
                j, i, "-" if cell is None else f"{cell.ratio:.2f}", ha="center", va="center", fontsize=9,
                fontweight="bold" if lost else "normal", color="white" if strong else "black",
            )  # fmt: skip
    axes.set_xticks(range(len(sizes)), [f"{k}\nx {n}" for k, n in sizes], fontsize=8)
    axes.set_yticks(range(len(rows)), [str(m) for m in rows], fontsize=8)
    axes.set_ylabel("M")
    axes.tick_params(length=0)
