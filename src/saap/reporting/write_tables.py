"""Writing the tables of a comparison or of a page as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saap.core.storage import write_whole
from saap.reporting.figures import slug
from saap.reporting.page import Page
from saap.reporting.tables import comparison_table, to_csv, to_latex, to_markdown

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


def write_page_tables(folder: Path, page: Page) -> list[Path]:
    """Every table of a page as Markdown and LaTeX, named by its section and caption."""
    paths = []
    for section in page.sections:
        for caption, table in section.tables:
            for ending in ("md", "tex"):
                path = folder / f"{section.name}-{slug(caption).lower()[:60].rstrip('-')}.{ending}"
                write_whole(path, WRITERS[ending](table).encode())
                paths.append(path)
    return paths
