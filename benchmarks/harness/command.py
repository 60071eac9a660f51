"""The results book: every claim and every open question as a reproducible experiment.

    python benchmarks/book.py list                                # the experiments, and how many cells are measured
    python benchmarks/book.py run [NAME ...] [--quick]            # measure missing cells, then write the pages
    python benchmarks/book.py render                              # only the pages, from the measured cells
    python benchmarks/book.py stale [NAME ...]                    # cells that other code than the present one measured
    python benchmarks/book.py measure NAME [--cells CELL ...]     # in this process; measures given cells again

An interrupted run resumes. Cells are in benchmarks/results, pages in docs/results; of --quick in out/results-quick.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.registry import EXPERIMENTS

from harness.digests import digests, stale, stale_folders
from harness.documents import write_documents
from harness.driver import measure, run, state_of
from harness.experiment import Experiment, Request
from harness.pages import write_pages
from harness.store import RESULTS, ROOT, finished_cells

SMALLEST = "smollm2"
PAGES, QUICK = ROOT / "docs" / "results", ROOT / "out" / "results-quick"
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}


def parse() -> tuple[argparse.Namespace, Request]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "run", "render", "stale", "measure"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiment")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="cells to measure, even if they exist")
    parser.add_argument("--quick", action="store_true", help="smoke run with small settings")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for pages and results")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for models")
    parser.add_argument("--model", default=SMALLEST)
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="option of an experiment")
    given = parser.parse_args()
    if given.command == "measure" and len(given.names) != 1:
        parser.error("measure takes one name")
    if given.cells and given.command != "measure":
        parser.error("--cells is of measure")
    if not set(given.names) <= set(BY_NAME):
        parser.error(f"the experiments are {', '.join(BY_NAME)}")
    given.chosen = [BY_NAME[name] for name in given.names] or EXPERIMENTS
    known = {option for experiment in given.chosen for option in experiment.options}
    options = dict(setting.partition("=")[::2] for setting in given.set)
    if not set(options) <= known:
        parser.error(f"--set takes OPTION=VALUE; options are {', '.join(sorted(known)) or 'none'}")
    if given.model != SMALLEST and not (given.out or given.quick):
        parser.error("--model needs --out, as the results of the book are of its own models")
    results = (given.out or QUICK) / "results" if given.out or given.quick else RESULTS
    # folders that a smoke run or another model has made are not taken for others of the same name
    default = ROOT / "out" / "-".join(["book", *(["quick"] if given.quick else []), Path(given.model).name])
    work = (given.work or default).resolve()
    request = Request(quick=given.quick, work=work, results=results, model=given.model, given=options)
    first = given.chosen[0]
    unknown = set(given.cells or ()) - {*first.names(request), *first.extra}
    if unknown:
        parser.error(f"{first.name} has no cell {', '.join(sorted(unknown))}")
    return given, request


def main() -> None:
    given, request = parse()
    if given.command == "list":
        for experiment in given.chosen:
            state = state_of(experiment, request)
            print(f"{experiment.name}: {len(state.found)} of {len(state.found) + len(state.missing)} cells")
    elif given.command == "stale":
        print_stale(given.chosen, request)
        for folder, reason in stale_folders(request.work):
            print(f"{folder}: made {reason}; without it, the next cell that needs it makes it again")
    elif given.command == "measure":
        measure(given.chosen[0], request, given.cells)
    else:
        # Before the first experiment, as its processes and those of all later ones share imported modules.
        codes = {experiment.name: digests(experiment.decided_by) for experiment in given.chosen}
        for experiment in given.chosen if given.command == "run" else ():
            run(experiment, request, codes[experiment.name])
        found = write_pages(EXPERIMENTS, request, given.out or (QUICK if given.quick else PAGES))
        if not given.quick and given.out is None:
            write_documents(found, request)


def print_stale(experiments: Sequence[Experiment], request: Request) -> None:
    """A line for each experiment and reason, with the cells."""
    for experiment in experiments:
        measured = finished_cells(experiment, request)
        cells: dict[str, list[str]] = {}
        for name, reason in stale(measured, experiment.decided_by):
            cells.setdefault(reason, []).append(name)
        for reason, names in cells.items():
            said = "; ".join(names) if len(names) < len(measured) else "all cells"
            print(f"{experiment.name}: measured {reason}: {said}")
