"""Progress with time left, on a terminal; silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, progress: bool | None = None) -> Iterator[T]:
    """Yields the items. progress: True shows a bar on stderr, False none, None one on a terminal."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        total = len(items) if isinstance(items, Sized) else None
        yield from bar.track(items, total=total, description=description)
