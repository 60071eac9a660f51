"""What a row of the book is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saap.reporting.figures import Figure

Values = Mapping[str, Any]
Cells = Mapping[str, Values]
"""What was measured, by the name of the cell (a step that can be taken up by itself)."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to measure. quick: a trial on little of everything. work: a folder for models that several cells use.

    model: what is pruned.
    """

    quick: bool
    work: Path
    model: str = "smollm2"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A measurement in cells. cells: their names, in the order in which they are measured.

    settings: what decides the figures; cells that were measured with others are measured again. measure: yields the
    wanted cells one by one, so that an interrupted run loses one of them at most.
    """

    cells: Callable[[Request], Sequence[str]]
    settings: Callable[[Request], Values]
    measure: Callable[[Request, Sequence[str]], Iterator[tuple[str, Values]]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The result of another benchmark: its file under `benchmarks/results`, and the command that makes it.

    by_hand: the command needs something that only a person can name, so it is shown and not run.
    """

    file: str
    command: str
    by_hand: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """A question and how it is answered: by an experiment of its own, or from results of other benchmarks.

    summarise: figures of the page from the cells, or from the sources by name; pure. figures: charts of the summary.
    limits: what the row does not say.
    """

    name: str
    title: str
    question: str
    summarise: Callable[[Cells], dict[str, Any]]
    figures: Callable[[Values], Sequence[Figure]]
    experiment: Experiment | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)
    limits: str = ""
