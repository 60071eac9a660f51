"""What an experiment is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saap.reporting.figures import Figure

Values = Mapping[str, Any]
Cells = Mapping[str, Values]
"""What was measured, by the name of the cell (a step that can be resumed by itself)."""
Measured = Iterator[tuple[str, Values]]
"""Names and values of cells, one by one."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to measure.

    quick: a smoke run on little of everything. work: folder for models that several cells use. results: folder of the
    files of cells. model: what is pruned. given: options of the experiment, from the command line.
    """

    quick: bool
    work: Path
    results: Path
    model: str = "smollm2"
    given: Mapping[str, str] = field(default_factory=dict)


def no_settings(request: Request) -> Values:
    """Nothing but the code decides the figures."""
    return {}


def no_figures(summary: Values) -> Sequence[Figure]:
    """A page without a chart."""
    return ()


def as_measured(cells: Cells) -> dict[str, Any]:
    """The cells as they are."""
    return dict(cells)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question, the cells that answer it, and a page.

    cells: their names, in the order in which they are measured. settings: what decides the figures; cells that were
    measured with others are measured again. measure: yields the wanted cells one by one, so that an interrupted run
    loses one of them at most. summarise: figures of the page from the cells; pure. figures: charts of the summary.
    The page itself, with title, question, finding and limits, is the template `templates/NAME.md.jinja`.

    options: what may be given with `--set`, by name, with its meaning. needs: those without which nothing is measured.
    reads: other experiments whose cells the page shows as well. extra: cells that the page shows if they are there.
    own_files: each cell is a file of its own, `results/CELL.json`, that holds the values alone. smoke: whether it can
    be tried on little of everything.
    """

    name: str
    cells: Callable[[Request], Sequence[str]]
    measure: Callable[[Request, Sequence[str]], Measured]
    summarise: Callable[[Cells], dict[str, Any]] = as_measured
    figures: Callable[[Values], Sequence[Figure]] = no_figures
    settings: Callable[[Request], Values] = no_settings
    options: Mapping[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()
    reads: Sequence[Experiment] = ()
    extra: Sequence[str] = ()
    own_files: bool = False
    smoke: bool = True
