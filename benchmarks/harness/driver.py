"""Measuring experiments: cells that are there stay, missing ones are measured in a process of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from harness.experiment import Experiment, Request
from harness.store import ROOT, Record, finished_cells, write_cell

SCRIPT = ROOT / "benchmarks" / "book.py"


@dataclass(frozen=True, kw_only=True)
class State:
    """What of an experiment has been measured. found: records of cells by name; missing: names."""

    found: dict[str, Record]
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether the page can be written."""
        return not self.missing


def state_of(experiment: Experiment, request: Request) -> State:
    """What there is of an experiment and of those that its page reads."""
    found: dict[str, Record] = {}
    missing: list[str] = []
    for one in (experiment, *experiment.reads):
        cells = finished_cells(one, request)
        found |= cells
        missing += [name for name in one.cells(request) if name not in cells]
    return State(found=found, missing=tuple(missing))


def missing_cells(experiment: Experiment, request: Request) -> list[str]:
    """The cells of the experiment itself that are to be measured."""
    found = finished_cells(experiment, request)
    return [name for name in experiment.cells(request) if name not in found]


def run(experiment: Experiment, request: Request, flags: Sequence[str]) -> None:
    """Measure what is missing in a process of its own, which gets the flags of this one."""
    lacking = [name for name in experiment.needs if name not in request.given]
    if not missing_cells(experiment, request):
        print(f"{experiment.name}: complete")
    elif lacking:
        asked = " ".join(f"--set {name}={experiment.options[name]}" for name in lacking)
        print(f"{experiment.name}: to be run by hand: python benchmarks/book.py run {experiment.name} {asked}")
    elif experiment.smoke or not request.quick:
        subprocess.run([sys.executable, str(SCRIPT), "measure", experiment.name, *flags], check=True)


def measure(experiment: Experiment, request: Request, cells: Sequence[str] | None = None) -> None:
    """Measure cells here, one after the other, each kept as soon as it is known; without `cells` the missing ones."""
    start = time.perf_counter()
    for name, values in experiment.measure(request, missing_cells(experiment, request) if cells is None else cells):
        seconds = time.perf_counter() - start
        write_cell(experiment, request, name, values, seconds)
        print(f"{experiment.name}: {name} ({seconds:.0f} s)", flush=True)
        start = time.perf_counter()
