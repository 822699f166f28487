"""Records as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from rich.table import Table
from rich.text import Text

from pyengine.terminal import deliver, grid

Record = dict[str, Any]

# Columns for which 80 characters have no room are left out below their width of the terminal.
WIDE = 120


def table(records: Sequence[Record], width: int) -> Table:
    """One line per contender, one section per case, warm and cold caches side by side."""
    title = (
        f"pyengine bench linear, {where(records)}\n"
        f"M x K x N; us per call, median{' and quartiles' if width >= WIDE else ''}; "
        "ratio: above 1 is faster than the fastest peer of the same kind of weights"
    )
    shown = grid("", ())
    shown.title = Text(title)
    columns = [column for column in COLUMNS if width >= column[2]]
    shown.add_column("", no_wrap=True)
    for header, _, _ in columns:
        shown.add_column(header, justify="right", no_wrap=True)
    for case, group in groupby(records, key=lambda record: record["case"]):
        shown.add_section()
        shown.add_row(Text(case, style="bold"))
        by_name: dict[str, dict[str, Record]] = {}
        for record in group:
            by_name.setdefault(record["contender"], {})[record["cache"]] = record
        for name, caches in by_name.items():
            shown.add_row(Text(f"  {name}"), *(cell(caches) for _, cell, _ in columns))
    return shown


def where(records: Sequence[Record]) -> str:
    """Instruction set, threads and processor: a number means nothing without."""
    about = records[0]["machine"]
    threads = "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"
    return f"{about['isa'].upper()}, {threads}, {about['cpu']}"


def problems(records: Iterable[Record]) -> list[str]:
    """One line for each contender that got no speed."""
    lines = (f"{r['case']} {r['contender']}: {r['check']}" for r in records if r["check"] != "ok")
    return list(dict.fromkeys(lines))


Cell = Callable[[dict[str, Record]], Text]


def _time(cache: str) -> Cell:
    def cell(caches: dict[str, Record]) -> Text:
        record = caches[cache]
        if record["median_s"] is None:
            return Text("no speed", style="red")
        return Text(f"{record['median_s'] * 1e6:.1f}")

    return cell


def _quartiles(cache: str) -> Cell:
    def cell(caches: dict[str, Record]) -> Text:
        q1, q3 = caches[cache]["q1_s"], caches[cache]["q3_s"]
        return Text("" if q1 is None else f"{q1 * 1e6:.1f}-{q3 * 1e6:.1f}", style="dim")

    return cell


def _ratio(cache: str) -> Cell:
    def cell(caches: dict[str, Record]) -> Text:
        ratio, ours = caches[cache]["ratio"], caches[cache]["ours"]
        if ratio is None:
            return Text("-")
        return Text(f"{ratio:.2f}x", style="" if not ours else "green" if ratio >= 1 else "red")

    return cell


def _number(cache: str, key: str, form: str, unit: str = "") -> Cell:
    def cell(caches: dict[str, Record]) -> Text:
        value = caches[cache][key]
        return Text("-" if value is None else format(value, form) + unit)

    return cell


# Header, cell, and the narrowest terminal that shows it: what is measured warm, then what is measured cold.
COLUMNS: tuple[tuple[str, Cell, int], ...] = (
    ("warm us", _time("warm"), 0),
    ("quartiles", _quartiles("warm"), WIDE),
    ("ratio", _ratio("warm"), 0),
    ("GMAC/s", _number("warm", "gmacs", ".1f"), 0),
    ("limit", _number("warm", "percent_of_limit", ".0f", "%"), WIDE),
    ("cold us", _time("cold"), 0),
    ("quartiles", _quartiles("cold"), WIDE),
    ("ratio", _ratio("cold"), 0),
    ("GB/s", _number("cold", "weight_gbs", ".1f"), 90),
    ("limit", _number("cold", "percent_of_limit", ".0f", "%"), 90),
    ("error", _number("warm", "relative_error", ".1e"), 0),
)


def publish(record: dict[str, Any], path: str | None) -> None:
    """Print a record as one JSON object, and write it to the path if there is one."""
    document = json.dumps(record, indent=1)
    deliver(document, path, lambda: print(document))
