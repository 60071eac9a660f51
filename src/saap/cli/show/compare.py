"""What `saap compare` shows: its table."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_comparison(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The table of all rows, as wide as it is."""
    table = Table(*map(escape, headings), box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(highlight=False, soft_wrap=True, width=max(80, sum(map(len, headings)) + 40 * 3))
    console.print(table)
