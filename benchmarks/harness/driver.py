"""Driver of experiments: existing cells are kept, missing ones are measured in separate processes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from lab.commands import in_own_process

from harness.digests import digests
from harness.experiment import Experiment, Names, Request
from harness.store import Record, finished_cells, write_cell


@dataclass(frozen=True, kw_only=True)
class State:
    """State of an experiment. found: records of cells by name; missing: names."""

    found: dict[str, Record]
    missing: tuple[str, ...]


def state_of(experiment: Experiment, request: Request) -> State:
    """State of an experiment, including those that its page reads."""
    found: dict[str, Record] = {}
    missing: list[str] = []
    for one in (experiment, *experiment.reads):
        found |= finished_cells(one, request)
        missing += missing_cells(one, request)
    return State(found=found, missing=tuple(missing))


def missing_cells(experiment: Experiment, request: Request) -> list[str]:
    found = finished_cells(experiment, request)
    return [name for name in experiment.names(request) if name not in found]


def run(experiment: Experiment, request: Request, code: Mapping[str, str] | None = None) -> None:
    """Measure missing cells in a separate process. code: as in `measure`."""
    lacking = [name for name in experiment.needs if name not in request.given]
    if not missing_cells(experiment, request):
        print(f"{experiment.name}: complete")
    elif lacking:
        options = " ".join(f"--set {name}={experiment.options[name]}" for name in lacking)
        print(f"{experiment.name}: to be run by hand: python benchmarks/book.py run {experiment.name} {options}")
    elif experiment.smoke or not request.quick:
        in_own_process(measure, experiment, request, None, code)


def measure(
    experiment: Experiment, request: Request, cells: Names | None = None, code: Mapping[str, str] | None = None
) -> None:
    """Measure cells in this process and write each one immediately; by default the missing ones.

    code: digests from the time when processes imported it. By default those of now, before the first cell. Code that
    is edited later is not what measures, or not alone, so the cells are stale then.
    """
    code = digests(experiment.decided_by) if code is None else code
    start = time.perf_counter()
    wanted = missing_cells(experiment, request) if cells is None else cells
    for name, values in experiment.measure(experiment.bound(request), wanted):
        seconds = time.perf_counter() - start
        write_cell(experiment, request, name, values, seconds, code)
        print(f"{experiment.name}: {name} ({seconds:.0f} s)", flush=True)
        start = time.perf_counter()
