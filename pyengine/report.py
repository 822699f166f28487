"""What a pass did to a model: what changed, what was left and why."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Change:
    """One layer that a pass replaced. Bytes are of weight, scales and bias."""

    name: str
    before: str
    after: str
    kernel: str
    bytes_before: int
    bytes_file: int
    bytes_runtime: int
    fallback: bool = False
    note: str = ""


@dataclass(frozen=True)
class Left:
    """One layer that a pass left as it was."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The result of a pass. print(report) is a table, report.to_json() a document."""

    title: str
    changes: tuple[Change, ...] = ()
    left: tuple[Left, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Names of the layers that run on the generic backend."""
        return tuple(change.name for change in self.changes if change.fallback)

    def total(self, what: str) -> int:
        """Sum over the changed layers of bytes_before, bytes_file or bytes_runtime."""
        return sum(getattr(change, what) for change in self.changes)

    def to_json(self) -> str:
        """The whole report as a JSON object: title, changes, left, aliases, totals."""
        totals = {what: self.total(what) for what in ("bytes_before", "bytes_file", "bytes_runtime")}
        return json.dumps({**asdict(self), "totals": totals}, indent=1)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(self.title), title_justify="left", title_style="bold")
        for header in ("layer", "was", "is", "kernel"):
            table.add_column(header, overflow="fold")
        for header in ("float", "file", "run time"):
            table.add_column(header, justify="right", no_wrap=True)
        for change in self.changes:
            kernel = f"{change.kernel} (fallback)" if change.fallback else change.kernel
            after = f"{change.after} ({change.note})" if change.note else change.after
            sizes = (change.bytes_before, change.bytes_file, change.bytes_runtime)
            table.add_row(*map(escape, (change.name, change.before, after, kernel)), *map(human_bytes, sizes))
        table.add_section()
        totals = (human_bytes(self.total(what)) for what in ("bytes_before", "bytes_file", "bytes_runtime"))
        table.add_row(f"{len(self.changes)} changed", "", "", "", *totals)
        out = io.StringIO()
        # Text for any file: no colours, and no display of its own in a notebook.
        width = min(130, max(80, shutil.get_terminal_size((130, 24)).columns))
        console = Console(file=out, width=width, color_system=None, force_jupyter=False)
        console.print(table)
        if self.left:
            rest = Table(
                title=f"{len(self.left)} left as they were", title_justify="left", title_style="bold"
            )
            for header in ("layer", "type", "reason"):
                rest.add_column(header, overflow="fold")
            for item in self.left:
                rest.add_row(*map(escape, (item.name, item.kind, item.reason)))
            console.print(rest)
        return out.getvalue().rstrip("\n")


def human_bytes(count: int) -> str:
    """1234567 -> 1.23 MB; powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    raise AssertionError("the loop returns at GB")
