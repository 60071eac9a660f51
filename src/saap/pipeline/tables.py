"""Writing the tables of a comparison beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saap.reporting.tables import comparison_table, to_csv, to_latex, to_markdown
from saap.storage import write_whole

WRITERS = {"csv": to_csv, "md": to_markdown, "tex": to_latex}


def write_tables(folder: Path, comparison: Mapping[str, Any]) -> list[Path]:
    """comparison.csv, .md and .tex in `folder`."""
    table = comparison_table(comparison)
    paths = []
    for ending, writer in WRITERS.items():
        path = folder / f"comparison.{ending}"
        write_whole(path, writer(table).encode())
        paths.append(path)
    return paths
