"""The record as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .measure import SHAPES

Record = dict[str, Any]


def heading(record: Record) -> str:
    """ISA, threads and processor: what every number here depends on."""
    about = record["machine"]
    threads = "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"
    return f"{about['isa']}, {threads}, {about['cpu']}"


def table(record: Record) -> Group:
    """One column per variant, COLUMNS in a row; beside sizes and times stands the ratio to torch fp32."""
    rows = record["variants"]
    parts = [_part(rows[at : at + COLUMNS], rows[0]) for at in range(0, len(rows), COLUMNS)]
    title = f"MiniLM-L6, {heading(record)}\n" + _LEGEND.format(sentences=record["sentences"])
    notes = [Text(f"{row['name']}: {row['note']}") for row in rows if row["note"]]
    return Group(Text(title, style="bold"), *parts, *notes)


def _part(rows: list[Record], first: Record) -> Table:
    shown = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("", no_wrap=True)
    for row in rows:
        shown.add_column(Text(row["name"]), justify="right", no_wrap=True)
    for label, cell in LINES:
        shown.add_row(label, *(cell(row, first) if "latency" in row else Text("-") for row in rows))
    return shown


COLUMNS = 4

_LEGEND = """w...: pyengine; {sentences} sentences
ms per forward of batch x tokens: median +- half quartile range
2.00x: half the size or time of torch fp32; 0.50x: twice as large or slow"""

Cell = Callable[[Record, Record], Text]


def _with_ratio(text: str, ratio: float, first: bool) -> Text:
    style = "green" if ratio >= 1 else "red"
    return Text(text) if first else Text.assemble(text, " ", (f"{ratio:.2f}x", style))


def _size(key: str) -> Cell:
    return lambda row, first: _with_ratio(f"{row[key] / 1e6:.1f}", first[key] / row[key], row is first)


def _latency(shape: str) -> Cell:
    def cell(row: Record, first: Record) -> Text:
        speed = row["latency"][shape]
        half = (speed["q3_ms"] - speed["q1_ms"]) / 2
        digits = 1 if speed["median_ms"] < 100 else 0
        return _with_ratio(
            f"{speed['median_ms']:.{digits}f} +-{half:.{digits}f}", speed["ratio"], row is first
        )

    return cell


def _number(key: str, form: str) -> Cell:
    return lambda row, first: Text(format(row[key], form))


LINES: tuple[tuple[str, Cell], ...] = (
    ("file, MB", _size("file_bytes")),
    ("memory, MB", _size("runtime_bytes")),
    *((f"{batch}x{tokens}, ms", _latency(f"{batch}x{tokens}")) for batch, tokens in SHAPES),
    ("cosine", _number("cosine", ".4f")),
    ("error", _number("relative_error", ".1%")),
    ("same 1-NN", _number("neighbours", ".1%")),
)
