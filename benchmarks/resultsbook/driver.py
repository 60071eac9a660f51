"""Measuring rows: what is there already stays, what lacks is measured in a process of its own."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resultsbook.row import Request, Row
from resultsbook.store import ROOT, SOURCES, finished_cell, read_json, write_cell

SCRIPT = ROOT / "benchmarks" / "book.py"


@dataclass(frozen=True, kw_only=True)
class State:
    """What of a row has been measured. found: records of cells, or the contents of sources, by name; missing: names."""

    found: dict[str, Any]
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether the row can be told."""
        return not self.missing


def state_of(row: Row, request: Request, out: Path) -> State:
    """What there is of a row, measured with the present settings."""
    if row.experiment is None:
        files = {name: SOURCES / source.file for name, source in row.sources.items()}
        found = {name: read_json(file) for name, file in files.items() if file.is_file()}
        return State(found=found, missing=tuple(name for name in files if name not in found))
    settings = row.experiment.settings(request)
    cells = {name: finished_cell(out, row.name, name, settings) for name in row.experiment.cells(request)}
    found = {name: record for name, record in cells.items() if record is not None}
    return State(found=found, missing=tuple(name for name in cells if name not in found))


def run_row(row: Row, request: Request, out: Path) -> None:
    """Measure what lacks. Results of other benchmarks are not made for a trial: they have no small version."""
    state = state_of(row, request, out)
    if state.complete:
        print(f"{row.name}: complete")
        return
    if row.experiment is None:
        for source in () if request.quick else [row.sources[name] for name in state.missing]:
            if source.by_hand:
                print(f"{row.name}: to be run by hand: {source.command}")
            else:
                subprocess.run([sys.executable, *shlex.split(source.command)[1:]], check=True, cwd=ROOT)
        return
    subprocess.run([sys.executable, str(SCRIPT), "measure", row.name, *flags_of(request, out)], check=True)


def flags_of(request: Request, out: Path) -> list[str]:
    """The request as flags of the script."""
    flags = ["--out", str(out), "--work", str(request.work), "--model", request.model]
    if request.quick:
        flags.append("--quick")
    return flags


def measure_row(row: Row, request: Request, out: Path) -> None:
    """Measure the missing cells of an experiment here, one after the other, each kept as soon as it is known."""
    if row.experiment is None:
        raise ValueError(f"{row.name} is made from results of other benchmarks")
    settings = row.experiment.settings(request)
    missing: Sequence[str] = state_of(row, request, out).missing
    start = time.perf_counter()
    for name, values in row.experiment.measure(request, missing):
        seconds = time.perf_counter() - start
        write_cell(out, row.name, name, settings, values, seconds)
        print(f"{row.name}: {name} ({seconds:.0f} s)", flush=True)
        start = time.perf_counter()
