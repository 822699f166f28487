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
PEER, ROOF = "#8A8A8A", "#444444"
# What the pictures take from a record.
NEEDED = (
    *("case", "m", "k", "n", "cache", "activations", "contender", "ours", "weights", "inputs", "sequence"),
    *("weight_bytes", "median_s", "gmacs", "limits", "machine"),
)

COMPUTE = {
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
        missing = [key for key in NEEDED if not isinstance(record, dict) or key not in record]
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
    peers = list({id(cell.peer): cell.peer for each in compare(records) for cell in each.cells}.values())
    roofs = _roofs(records, {f"gmacs_{r['sequence']}" for r in (*kernels, *peers)})
    everything = [*kernels, *peers]
    speeds, intensities = [r["gmacs"] for r in everything], [_intensity(r) for r in everything]
    top = max((*speeds, *roofs.values()), default=1.0)
    for axes, cache in zip(figure.subplots(1, 2, sharey=True), CACHES, strict=True):
        axes.set(xscale="log", yscale="log", title=f"{cache} caches")
        axes.set_xlim(min(intensities, default=1.0) / 1.6, max(intensities, default=1.0) * 12)
        axes.set_ylim(min(speeds, default=1.0) / 2, top * 1.6)
        axes.set_xlabel("multiply-accumulates per byte of weights")
        axes.grid(alpha=0.25, which="major")
        _draw_roofs(axes, roofs, _roofs(records, set(BANDWIDTHS[cache])))
        axes.scatter(
            *_points(peers, cache), marker="x", s=18, linewidths=1, color=PEER, zorder=2,
            label="fastest peer of a cell",
        )  # fmt: skip
        for index, name in enumerate(names):
            axes.scatter(
                *_points([r for r in kernels if r["contender"] == name], cache), s=34, zorder=3,
                marker=MARKERS[index % len(MARKERS)], color=COLOURS[index % len(COLOURS)],
                edgecolors="white", linewidths=0.6, label=name.removeprefix("pyengine "),
            )  # fmt: skip
    figure.axes[0].set_ylabel("GMAC/s")
    figure.axes[0].legend(loc="lower right", fontsize=9)
    return figure


def _points(records: Sequence[Record], cache: str) -> tuple[list[float], list[float]]:
    chosen = [r for r in records if r["cache"] == cache]
    return [_intensity(r) for r in chosen], [r["gmacs"] for r in chosen]


def _intensity(record: Record) -> float:
    return float(record["m"] * record["k"] * record["n"] / record["weight_bytes"])


def _roofs(records: Sequence[Record], names: set[str]) -> dict[str, float]:
    """The highest that was measured of each."""
    return {
        name: max(r["limits"][name] for r in records)
        for name in (*COMPUTE, *BANDWIDTHS["warm"], *BANDWIDTHS["cold"])
        if name in names and all(name in r["limits"] for r in records)
    }


def _draw_roofs(axes: Any, compute: dict[str, float], bandwidths: dict[str, float]) -> None:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    text, line = {"fontsize": 8, "color": ROOF}, {"color": ROOF, "linewidth": 1.2, "zorder": 1}
    for name, speed in compute.items():
        axes.axhline(speed, linestyle=(0, (6, 3)), **line)
        axes.text(right / 1.1, speed * 1.03, f"{COMPUTE[name]} {speed:.0f} GMAC/s", ha="right", **text)
    ridge = max(compute.values(), default=top)
    labels = BANDWIDTHS["warm"] | BANDWIDTHS["cold"]
    for index, (name, speed) in enumerate(bandwidths.items()):
        start = max(left, bottom / speed)
        axes.plot([start, ridge / speed], [start * speed, ridge], **line)
        # Of two lines side by side, the second one's name stands below it.
        away, side = (0.93, "top") if index else (1.07, "bottom")
        axes.text(
            start * 1.3, start * 1.3 * speed * away, f"{labels[name]} {speed:.0f} GB/s", va=side,
            rotation=math.degrees(math.atan(speed)), rotation_mode="anchor", transform_rotates_text=True,
            **text,
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
    sizes = sorted({(r["k"], r["n"]) for r in records}, key=lambda size: (size[0] * size[1], size))
    rows = sorted({r["m"] for r in records})
    height, width = 0.42 * len(rows) + 1.15, 0.86 * len(sizes) + 1.2
    figure = Figure(figsize=(2 * max(width, 4.2), height * len(layers) + 1), layout="constrained")
    what = "Speed over the fastest peer's with the same kind of weights: blue is faster, orange is slower"
    figure.suptitle(_title(what, records), fontsize=12)
    grid = figure.subplots(len(layers), 2, squeeze=False)
    for line, (name, weights) in zip(grid, layers.items(), strict=True):
        for axes, cache in zip(line, CACHES, strict=True):
            cells = {(c.ours["m"], c.ours["k"], c.ours["n"]): c for c in maps[name, cache].cells}
            _map(axes, cells, rows, sizes)
            axes.set_title(f"{name.removeprefix('pyengine ')} against {weights} peers, {cache}", fontsize=10)
    return figure


def _map(
    axes: Any, cells: dict[tuple[int, int, int], Cell], rows: list[int], sizes: list[tuple[int, int]]
) -> None:
    """Blue: won. Orange, the number bold: lost. Grey: one of the two has no speed."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("lost to won", ("#D55E00", "#FFFFFF", "#0072B2"))
    axes.set_facecolor("#DDDDDD")
    for i, m in enumerate(rows):
        for j, size in enumerate(sizes):
            cell = cells.get((m, *size))
            if cell is None:
                axes.text(j, i, "-", ha="center", va="center", fontsize=9)
                continue
            log = math.log2(cell.ratio)
            # However close to 1, the colour says which side it is on.
            strength = min(1.0, 0.25 + abs(log) / 2)
            colour = shades(0.5 + math.copysign(strength / 2, log))
            axes.fill(
                [j - 0.5, j + 0.5, j + 0.5, j - 0.5], [i - 0.5, i - 0.5, i + 0.5, i + 0.5], color=colour
            )
            axes.text(
                j, i, f"{cell.ratio:.2f}", ha="center", va="center", fontsize=9,
                fontweight="bold" if log < 0 else "normal", color="white" if strength > 0.75 else "black",
            )  # fmt: skip
    axes.set(xlim=(-0.5, len(sizes) - 0.5), ylim=(len(rows) - 0.5, -0.5), ylabel="M")
    axes.set_xticks(range(len(sizes)), [f"{k}\nx {n}" for k, n in sizes], fontsize=8)
    axes.set_yticks(range(len(rows)), [str(m) for m in rows], fontsize=8)
    axes.tick_params(length=0)
