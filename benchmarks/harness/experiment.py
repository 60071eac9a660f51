"""What an experiment is, and the types of its functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from saap.reporting.figures import Figure

Values = Mapping[str, Any]
Cells = Mapping[str, Values]
"""What was measured, by the name of the cell (a step that can be resumed by itself)."""
Names = Sequence[str]
Measured = Iterator[tuple[str, Values]]
"""Names and values of cells, one by one."""
Figures = Sequence[Figure]


class Scaled(NamedTuple):
    """A setting that is smaller in a smoke run."""

    smoke: Any
    full: Any


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to measure.

    quick: a smoke run on little of everything. work: folder for models that several cells use. results: folder of the
    files of cells. model: what is pruned. given: options of the experiment, from the command line. settings: of the
    experiment, filled in for its own functions.
    """

    quick: bool
    work: Path
    results: Path
    model: str = "smollm2"
    given: Mapping[str, str] = field(default_factory=dict)
    settings: Values = field(default_factory=dict)

    def size(self, smoke: Any, full: Any) -> Any:
        """What is smaller in a smoke run."""
        return smoke if self.quick else full

    def filled(self, setting: Any) -> Any:
        """The value of a setting in this run."""
        value = self.size(*setting) if isinstance(setting, Scaled) else setting
        if isinstance(value, list):
            return [self.filled(one) for one in value]
        return value.replace("{model}", self.model) if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question, the cells that answer it, and a page.

    Each is a module whose functions and constants (in upper case) have the names of these fields. The page itself,
    with title, question, finding and limits, is the template `templates/NAME.md.jinja`.

    cells: their names, in the order in which they are measured. settings: what decides the figures; cells that were
    measured with others are measured again; `{model}` stands for what is pruned. measure: yields the wanted cells one
    by one, so that an interrupted run loses one of them at most. summarise: figures of the page from the cells; pure.
    figures: charts of the summary.

    options: what may be given with `--set`, by name, with its meaning. needs: those without which nothing is measured.
    reads: modules of other experiments whose cells the page shows as well. extra: cells that the page shows if they
    are there. own_files: each cell is a file of its own, `results/CELL.json`, that holds the values alone. smoke:
    whether it can be tried on little of everything.
    """

    name: str
    module: str = ""
    cells: Names | Callable[[Request], Names]
    measure: Callable[[Request, Names], Measured]
    summarise: Callable[[Cells], Values] = lambda cells: cells
    figures: Callable[[Values], Figures] = lambda summary: ()
    settings: Values = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    needs: Names = ()
    reads: Sequence[Experiment] = ()
    extra: Names = ()
    own_files: bool = False
    smoke: bool = True

    def chosen(self, request: Request) -> dict[str, Any]:
        """The settings of a run."""
        return {name: request.filled(value) for name, value in self.settings.items()}

    def bound(self, request: Request) -> Request:
        """The request with the settings of this experiment."""
        return replace(request, settings=self.chosen(request))

    def names(self, request: Request) -> list[str]:
        """The cells of a run."""
        return list(self.cells(self.bound(request)) if callable(self.cells) else self.cells)


@cache
def experiment(path: str) -> Experiment:
    """The experiment of a module, e.g. `cost.speed`."""
    module = vars(import_module(f"experiments.{path}"))
    functions = [name for name in ("cells", "measure", "summarise", "figures") if name in module]
    constants = [one.name for one in fields(Experiment) if one.name not in functions and one.name.upper() in module]
    found: dict[str, Any] = {n: module[n] for n in functions} | {n: module[n.upper()] for n in constants}
    name = path.rpartition(".")[2].replace("_", "-")
    return Experiment(
        **{**found, "name": name, "module": path, "reads": [experiment(one) for one in found.get("reads", ())]}
    )
