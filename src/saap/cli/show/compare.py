"""What `saap compare` shows: its table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saap.core.evaluation_records import Comparison
from saap.reporting.comparison import comparison_table


def print_comparison(comparison: Comparison, written: Iterable[Path]) -> None:
    """The table of all rows, as wide as it is, and the files that were written."""
    headings, rows = comparison_table(comparison)
    table = Table(*map(escape, headings), box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(highlight=False, soft_wrap=True, width=max(80, sum(map(len, headings)) + 40 * 3))
    console.print(table)
    print(f"wrote {', '.join(map(str, written))}")
