"""The record as a picture: what a variant keeps of the quality, against its speed and size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .show import Record, heading

# Torch in grey tones, ours in colour; a colour belongs to a variant whichever others are shown.
COLOURS = {
    "torch fp32": "#7d889e",
    "torch int8": "#3d4657",
    "w8": "#1f8a7d",
    "w8a8": "#d9542f",
    "w4_g32_asym": "#7a4fb5",
    "w4a8_g32": "#c08a1e",
    "w4a8_g32_asym": "#b03a6f",
}
INK, FAINT, GRID = "#1d2433", "#5c677d", "#eceef2"
AREA_PER_MB = 42.0  # square points
SHAPE = "1x128"

# Where a label may stand, from its disc's centre, the preferred place first; y points up.
PLACES = ((0, -1), (0, 1), *((dx, dy) for dx in (-0.4, 0.4, -0.85, 0.85) for dy in (1, -1)), (1, 0), (-1, 0))
GAP = 6  # points around a label

Box = tuple[float, float, float, float]  # left, bottom, right, top in points


def picture(record: Record, path: Path) -> None:
    """Cosine to fp32 against latency at 1x128 tokens, as PNG; a disc's area is the size of the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted((row for row in record["variants"] if "latency" in row), key=lambda row: -row["file_bytes"])
    figure = Figure(figsize=(9, 5.8), dpi=150, facecolor="white")
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.10, 0.11, 0.87, 0.73))
    _frame(axes, rows)
    for row in rows:
        speed, colour = row["latency"][SHAPE], _colour(row)
        x, y = speed["median_ms"], row["cosine"]
        area = row["file_bytes"] / 1e6 * AREA_PER_MB
        axes.scatter([x], [y], s=area, color=colour, alpha=0.88, edgecolors="white", linewidths=1.5, zorder=2)
        axes.hlines(y, speed["q1_ms"], speed["q3_ms"], color="white", lw=2, zorder=3)
    _label(axes, rows, canvas.get_renderer())
    about = record["machine"]
    title = f"MiniLM-L6 at {SHAPE.replace('x', ' x ')} tokens: quality against speed, area = file size"
    below = (
        f"{heading(record)}, torch {about['torch']}, {about['date'][:10]}; {record['sentences']} sentences"
    )
    figure.text(0.10, 0.945, title, fontsize=13, weight="bold", color=INK)
    figure.text(0.10, 0.893, below, fontsize=9.5, color=FAINT)
    figure.savefig(path, format="png")


def _colour(row: Record) -> str:
    return COLOURS.get(row["name"], "#457b9d")


def _frame(axes: Any, rows: list[Record]) -> None:
    xs, low = [row["latency"][SHAPE]["median_ms"] for row in rows], min(row["cosine"] for row in rows)
    lost = max(1 - low, 1e-4)
    axes.set_xlim(min(xs) - 0.45 * max(xs), max(xs) * 1.3)
    axes.set_xlim(max(0.0, axes.get_xlim()[0]))
    axes.set_ylim(low - lost * 0.5, 1 + lost * 0.4)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1 + 1e-9 and tick >= axes.get_ylim()[0]])
    axes.axhline(1, color="#b8bfcc", lw=1, ls="--", zorder=1)
    axes.set_xlabel(
        "latency of one forward, ms (left is faster; white line: from quartile to quartile)", color=INK
    )
    axes.set_ylabel("mean cosine to the float32 embeddings (up is better)", color=INK)
    axes.grid(color=GRID, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(color=FAINT, labelcolor=FAINT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#b8bfcc")


def _label(axes: Any, rows: list[Record], renderer: Any) -> None:
    """Name and numbers beside each disc, where they cover the least of the other discs and labels."""
    scale = 72 / axes.figure.dpi
    discs, centres = [], []
    for row in rows:
        x, y = axes.transData.transform((row["latency"][SHAPE]["median_ms"], row["cosine"])) * scale
        radius = math.sqrt(row["file_bytes"] / 1e6 * AREA_PER_MB / math.pi)
        # A disc leaves the corners of its square free.
        discs.append(_around(x, y, 1.7 * radius, 1.7 * radius))
        centres.append((x, y, radius))
    inside = axes.get_window_extent(renderer)
    taken: list[Box] = list(discs)
    for row, (x, y, radius) in zip(rows, centres, strict=True):
        speed = row["latency"][SHAPE]
        numbers = f"{row['file_bytes'] / 1e6:.0f} MB, {speed['median_ms']:.1f} ms, {speed['ratio']:.2f}x"
        text = axes.annotate(
            f"{row['name']}\n{numbers}", (0, 0), xycoords="figure points", ha="center", va="center",
            fontsize=10, weight="bold", color=_colour(row), linespacing=1.3, zorder=4,
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        width, height = extent.width * scale + GAP, extent.height * scale + GAP
        boxes = [
            _around(x + dx * (radius + width / 2), y + dy * (radius + height / 2), width, height)
            for dx, dy in PLACES
        ]
        bounds = (inside.x0 * scale, inside.y0 * scale, inside.x1 * scale, inside.y1 * scale)
        best = min(
            boxes, key=lambda box: sum(_overlap(box, other) for other in taken) + _outside(box, bounds)
        )
        taken.append(best)
        text.xy = ((best[0] + best[2]) / 2, (best[1] + best[3]) / 2)
        text.set_position(text.xy)


def _around(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, bounds: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, bounds)
