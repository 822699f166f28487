"""What a command shows: text that is safe for a terminal, tables, JSON documents."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def shown(text: object) -> str:
    """Text of a file or a path, what is unprintable in it as an escape: terminals obey control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def console() -> Console:
    """On stdout, for text that is not ours: no mark-up, no emoji names, no colours for numbers."""
    return Console(highlight=False, markup=False, emoji=False)


def grid(title: str, headers: tuple[str, ...], right: tuple[str, ...] = ()) -> Table:
    """An empty table; columns fold where the terminal is narrow. right: the right-justified columns."""
    table = Table(
        title=Text(shown(title)),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for header in headers:
        table.add_column(header, overflow="fold", justify="right" if header in right else "left")
    return table


def add(table: Table, *cells: object) -> None:
    """A row of plain text, each cell made safe."""
    table.add_row(*(Text(shown(cell)) for cell in cells))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file that appears whole or not at all."""
    temporary = f"{os.fspath(path)}.{secrets.token_hex(6)}.tmp"
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from None
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def deliver(document: str, target: str | None, show: Callable[[], None]) -> None:
    """--json prints the document alone; --json F writes it and shows the table; without, just the table."""
    if target == "-":
        print(document)
        return
    if target is not None:
        write_text(target, document + "\n")
    show()
