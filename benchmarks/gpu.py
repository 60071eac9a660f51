"""What only an accelerator can show, measured on one card within 20 minutes.

    python benchmarks/gpu.py [--model FILE.gguf] [--folder DIR]    # or `make gpu`; goes on where it was stopped
    python benchmarks/gpu.py --smoke --out DIR                     # every step with tiny models, on whatever is there

The steps are the cells of the experiment `accelerator`, experiments/cost/accelerator.py. Writes
benchmarks/results/accelerator.json and the pages; with --smoke DIR/accelerator.json alone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from experiments.cost.accelerator import EXPERIMENT, has_accelerator
from experiments.registry import EXPERIMENTS
from harness.driver import measure
from harness.experiment import Request
from harness.pages import write_pages
from harness.store import RESULTS, ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="GGUF file or folder of a real model for the step `real`")
    parser.add_argument("--folder", type=Path, help="of checkpoints; without it one in the system's temporary folder")
    parser.add_argument("--out", type=Path, help="of results; benchmarks/results, with --smoke inside --folder")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if not (given.smoke or has_accelerator()):
        parser.error("there is no accelerator here; --smoke tries every step on the CPU")
    folder = given.folder or Path(tempfile.gettempdir()) / f"saap-gpu{'-smoke' if given.smoke else ''}"
    results = given.out or (folder / "results" if given.smoke else RESULTS)
    model = {} if given.model is None else {"model": str(given.model)}
    request = Request(quick=given.smoke, work=folder, results=results, given=model)
    measure(EXPERIMENT, request)
    if not given.smoke:
        whole = Request(quick=False, work=folder, results=RESULTS)
        write_pages(EXPERIMENTS, whole, ROOT / "docs" / "results")


if __name__ == "__main__":
    main()
