"""The results book: every claim and every open question as a row that anyone can measure again.

    python benchmarks/book.py list                       # the rows, and what of them has been measured
    python benchmarks/book.py run [ROW ...] [--quick]    # measure what is missing, then write the pages
    python benchmarks/book.py render                     # only the pages, from what has been measured
    python benchmarks/book.py measure ROW                # the missing cells of one row, in this process

A run that was stopped goes on: finished cells stay. Pages, charts and the values behind them are in docs/results, with
--quick (little of everything, to try it) in out/results-quick.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resultsbook.driver import measure_row, run_row, state_of
from resultsbook.pages import write_pages
from resultsbook.registry import ROWS
from resultsbook.row import Request
from resultsbook.store import ROOT

RESULTS, QUICK_RESULTS = ROOT / "docs" / "results", ROOT / "out" / "results-quick"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    names = [row.name for row in ROWS]
    for name in ("list", "run", "render", "measure"):
        command = commands.add_parser(name)
        command.add_argument("--quick", action="store_true", help="a trial on little of everything")
        command.add_argument("--out", type=Path, metavar="DIR", help="where pages and values go")
        command.add_argument("--work", type=Path, metavar="DIR", default=ROOT / "out" / "book", help="for models")
        command.add_argument("--model", default="smollm2")
        if name == "run":
            command.add_argument("rows", nargs="*", metavar="ROW", choices=[*names, []])
        if name == "measure":
            command.add_argument("rows", nargs=1, metavar="ROW", choices=names)
    return parser.parse_args()


def main() -> None:
    given = parse()
    request = Request(quick=given.quick, work=given.work, model=given.model)
    out = given.out or (QUICK_RESULTS if given.quick else RESULTS)
    chosen = [row for row in ROWS if not getattr(given, "rows", None) or row.name in given.rows]
    if given.command == "list":
        for row in chosen:
            state = state_of(row, request, out)
            print(f"{row.name}: {len(state.found)} of {len(state.found) + len(state.missing)}; {row.question}")
        return
    if given.command == "measure":
        measure_row(chosen[0], request, out)
        return
    if given.command == "run":
        for row in chosen:
            run_row(row, request, out)
    write_pages(ROWS, request, out)


if __name__ == "__main__":
    main()
