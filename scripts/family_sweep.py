"""Prune a tiny random model of every causal language model in transformers, in both layouts, and say what came of it.

    python scripts/family_sweep.py [--results FILE] [FAMILY ...]

About an hour on two cores. Each family runs in a process of its own; results are kept one by one in the file, so an
interrupted sweep goes on. Ends with 1 if a family ends in a raw exception, in a wrong result or not in time, or if
anything but saap's own refusal is printed meanwhile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600
BAD = ("raised", "wrong", "no end")
PRINTS = ", and prints"


def main() -> int:
    """Sweep, print one line for each family and layout, and the counts."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    import torch
    from tests.conformance.every_family import FAMILIES

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES, metavar="FAMILY")
    parser.add_argument("--results", type=Path, default=ROOT / "out" / "families.json")
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for family in arguments.families:
        if family not in results:
            results[family] = _in_a_process(family)
            arguments.results.write_text(json.dumps(results, indent=1) + "\n")
        for layout, found in _by_layout(results[family]):
            print(
                f"{family} {layout}: {_outcome(found)}. {found.get('message', '')}{found.get('printed', '')}",
                flush=True,
            )
    counts = Counter((layout, _outcome(found)) for each in results.values() for layout, found in _by_layout(each))
    for (layout, outcome), count in sorted(counts.items()):
        print(f"{layout} {outcome}: {count}")
    return int(any(outcome in BAD or outcome.endswith(PRINTS) for _, outcome in counts))


def _outcome(found: dict[str, Any]) -> str:
    """What came of it; bad too where anything was written to standard output or error meanwhile."""
    return found["outcome"] + (PRINTS if found.get("printed") else "")


def _by_layout(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("both", result)] if "outcome" in result else list(result.items())


def _in_a_process(family: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("fork").Process(target=_attempt, args=(family, folder))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return {"outcome": "no end", "message": f"stopped after {SECONDS} seconds"}
        file = Path(folder, "result.json")
        if not file.exists():
            return {"outcome": "raised", "message": f"its process ended with {process.exitcode}"}
        return dict(json.loads(file.read_text()))


def _attempt(family: str, folder: str) -> None:
    from tests.conformance.every_family import attempt

    Path(folder, "result.json").write_text(json.dumps(attempt(family, Path(folder))))


if __name__ == "__main__":
    sys.exit(main())
