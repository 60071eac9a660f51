"""The results book: every claim and every open question as a reproducible experiment.

    python benchmarks/book.py list                                # the experiments, and how many cells are measured
    python benchmarks/book.py run [NAME ...] [--quick]            # measure missing cells, then write the pages
    python benchmarks/book.py render                              # only the pages, from the measured cells
    python benchmarks/book.py measure NAME [--cells CELL ...]     # in this process; measures given cells again python
    benchmarks/book.py unpack DIR                          # the comparison as a folder of `saap compare`

An interrupted run resumes and keeps finished cells. Cells are in benchmarks/results, pages and charts in docs/results;
with --quick (a smoke run with small settings) both are in out/results-quick.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.quality.comparison import unpack
from experiments.registry import EXPERIMENTS

from harness.driver import measure, run, state_of
from harness.experiment import Request
from harness.pages import write_pages
from harness.store import RESULTS, ROOT

PAGES, QUICK = ROOT / "docs" / "results", ROOT / "out" / "results-quick"
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}


def parse() -> tuple[argparse.Namespace, Request]:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("list", "run", "render", "measure", "unpack"):
        command = commands.add_parser(name)
        if name == "run":
            command.add_argument("names", nargs="*", metavar="NAME", choices=[*BY_NAME, []])
        if name == "measure":
            command.add_argument("names", nargs=1, metavar="NAME", choices=BY_NAME)
            command.add_argument("--cells", nargs="+", metavar="CELL", help="cells to measure, even if they exist")
        if name == "unpack":
            command.add_argument("folder", type=Path, metavar="DIR")
        command.add_argument("--quick", action="store_true", help="smoke run with small settings")
        command.add_argument("--out", type=Path, metavar="DIR", help="folder for pages and results")
        command.add_argument(
            "--work", type=Path, metavar="DIR", default=ROOT / "out" / "book", help="folder for models"
        )
        command.add_argument("--model", default="smollm2")
        command.add_argument(
            "--set", action="append", default=[], metavar="OPTION=VALUE", help="option of an experiment"
        )
    given = parser.parse_args()
    given.chosen = [BY_NAME[name] for name in getattr(given, "names", ())] or EXPERIMENTS
    known = {option for experiment in given.chosen for option in experiment.options}
    options = dict(setting.partition("=")[::2] for setting in given.set)
    if not set(options) <= known:
        parser.error(f"--set takes OPTION=VALUE; options are {', '.join(sorted(known)) or 'none'}")
    results = (given.out or QUICK) / "results" if given.out or given.quick else RESULTS
    request = Request(
        quick=given.quick, work=given.work.resolve(), results=results, model=given.model, given=options
    )  # fmt: skip
    first = given.chosen[0]
    unknown = set(getattr(given, "cells", None) or ()) - {*first.names(request), *first.extra}
    if unknown:
        parser.error(f"{first.name} has no cell {', '.join(sorted(unknown))}")
    return given, request


def main() -> None:
    """Entry point."""
    given, request = parse()
    if given.command == "list":
        for experiment in given.chosen:
            state = state_of(experiment, request)
            print(f"{experiment.name}: {len(state.found)} of {len(state.found) + len(state.missing)} cells")
    elif given.command == "measure":
        measure(given.chosen[0], request, given.cells)
    elif given.command == "unpack":
        unpack(request, given.folder)
    else:
        for experiment in given.chosen if given.command == "run" else ():
            run(experiment, request)
        write_pages(EXPERIMENTS, request, given.out or (QUICK if given.quick else PAGES))
