"""The report page: sections of text, figures and tables, in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources

import jinja2

from saap._version import __version__
from saap.reporting.figures import Figure, to_svg
from saap.reporting.tables import Table, numbered

LONG = 14
"""Number of rows from which a table is collapsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of the page.

    name: its anchor. tables: (caption, table), collapsed if long or if fold_tables is set. lowest_is_best: mark the
    lowest number of each column of its tables. answers: (prompt, ((model, text), ...)). code: commands.
    """

    name: str
    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[tuple[str, Table]] = ()
    answers: Sequence[tuple[str, tuple[tuple[str, str], ...]]] = ()
    code: str = ""
    lowest_is_best: bool = False
    fold_tables: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A whole report. tiles: (value, label), the headline figures.

    Sections and figures of the same name get numbers: the names are those of anchors and files.
    """

    title: str
    summary: str
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]

    def __post_init__(self) -> None:
        sections = numbered(section.name for section in self.sections)
        figures = iter(numbered(figure.name for figure in self.figures))
        object.__setattr__(self, "sections", [
            replace(section, name=name, figures=[replace(one, name=next(figures)) for one in section.figures])
            for section, name in zip(self.sections, sections, strict=True)
        ])  # fmt: skip

    @property
    def figures(self) -> list[Figure]:
        """All figures of the page."""
        return [figure for section in self.sections for figure in section.figures]


def render(page: Page) -> str:
    """The page as HTML. Raises EvaluationError if matplotlib is missing."""
    template = (resources.files("saap.reporting") / "page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        page=page, svg=to_svg, lowest=lowest_of_columns, long=LONG, version=__version__
    )


def lowest_of_columns(table: Table) -> set[tuple[int, int]]:
    """Row and column of the lowest number in each column after the first; text after a number is its deviation."""
    found = set()
    for column in range(1, len(table[0])):
        numbers = {}
        for row, cells in enumerate(table[1]):
            with suppress(ValueError, IndexError):
                numbers[row] = float(cells[column].split()[0])
        if len(numbers) > 1:
            found.add((min(numbers, key=lambda row: numbers[row]), column))
    return found
