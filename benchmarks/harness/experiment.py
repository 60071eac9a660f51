"""Definition of an experiment, and the types of its functions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from harness.digests import PRUNING
from saap.reporting.figures import Figure

Values = Mapping[str, Any]
Cells = Mapping[str, Values]
"""Measured values by name of the cell (a resumable step)."""
Names = Sequence[str]
Measured = Iterator[tuple[str, Values]]
"""Iterator over names and values of cells."""
Figures = Sequence[Figure]


class Scaled(NamedTuple):
    """A setting with a smaller value for smoke runs."""

    smoke: Any
    full: Any


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to measure.

    quick: a smoke run with small settings. work: folder for models shared by cells. results: folder of cells' files.
    given: options of the experiment, from the command line. settings: of the experiment, filled in for its functions.
    """

    quick: bool
    work: Path
    results: Path
    model: str = "smollm2"
    given: Mapping[str, str] = field(default_factory=dict)
    settings: Values = field(default_factory=dict)

    def size(self, smoke: Any, full: Any) -> Any:
        return smoke if self.quick else full

    def filled(self, setting: Any) -> Any:
        value = self.size(*setting) if isinstance(setting, Scaled) else setting
        if isinstance(value, list):
            return [self.filled(one) for one in value]
        return value.replace("{model}", self.model) if isinstance(value, str) else value


def no_figures(summary: Values) -> Figures:
    return ()


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question, the cells that answer it, and a page.

    Each experiment is a module whose functions and constants (in upper case) have the names of these fields. The page,
    with title, question, finding and limits, is the template `templates/NAME.md.jinja`.

    cells: their names, in the order of measuring. settings: everything that affects the figures; cells with other
    settings are measured again; `{model}` is replaced by the model to prune. measure: yields the requested cells one by
    one, so that an interrupted run loses at most one of them. summarise: figures of the page from the cells; pure.
    figures: charts of the summary, in the order of the template's block `charts`, which has their titles and texts.

    options: of `--set`, name to description. needs: required options. reads: modules of other experiments whose cells
    the page also shows. extra: optional cells of the page. own_files: each cell has its own file, `results/CELL.json`,
    with only the values. smoke: whether a smoke run is supported. decided_by: packages and files of saap that decide
    the figures; the module itself and `benchmarks/lab` are added. partial: whether some cells are enough for a page.
    """

    name: str
    cells: Names | Callable[[Request], Names]
    measure: Callable[[Request, Names], Measured]
    summarise: Callable[[Cells], Values] = dict
    figures: Callable[[Values], Figures] = no_figures
    settings: Values = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    needs: Names = ()
    reads: Sequence["Experiment"] = ()
    extra: Names = ()
    own_files: bool = False
    smoke: bool = True
    decided_by: Names = PRUNING
    partial: bool = False

    def chosen(self, request: Request) -> dict[str, Any]:
        return {name: request.filled(value) for name, value in self.settings.items()}

    def bound(self, request: Request) -> Request:
        """The request with the settings of this experiment."""
        return replace(request, settings=self.chosen(request))

    def names(self, request: Request) -> list[str]:
        return list(self.cells(self.bound(request)) if callable(self.cells) else self.cells)


@cache
def experiment(path: str) -> Experiment:
    """The experiment of a module, e.g. `cost.speed`."""
    module = vars(import_module(f"experiments.{path}"))
    functions = [name for name in ("cells", "measure", "summarise", "figures") if name in module]
    constants = [one.name for one in fields(Experiment) if one.name not in functions and one.name.upper() in module]
    found: dict[str, Any] = {n: module[n] for n in functions} | {n: module[n.upper()] for n in constants}
    found["reads"] = [experiment(one) for one in found.get("reads", ())]
    own = (f"benchmarks/experiments/{path.replace('.', '/')}.py", "benchmarks/lab")
    found["decided_by"] = (*found.get("decided_by", PRUNING), *own)
    return Experiment(**found, name=path.rpartition(".")[2].replace("_", "-"))
