"""What several processes save of the estimation's time, one thread each.

One process and two, in turns; the same random token ids, float32, on the CPU. Timed is the estimation alone, from the
moment in which all are ready until all have the whole result, after a short one that warms up; the least of the rounds
counts. To be run while the machine does nothing else: it needs as many idle cores as there are processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness.experiment import Cells, Measured, Names, Request, Scaled, Values
from harness.store import ROOT

from experiments.cost.estimation_cost import first, opened
from saap.core.storage import read_scores, write_scores
from saap.estimation.calibrate import estimate
from saap.models.loading.devices import quick_float32_products
from saap.models.walk.processes import Processes

COUNTS = (1, 2)
STATISTICS = ("vector", "vector_m2", "element", "element_m2", "comoment")
CELLS = ["estimation"]
SETTINGS = {
    "model": "{model}", "samples": Scaled(4, 50), "length": Scaled(32, 128),
    "rounds": Scaled(1, 2),
}  # fmt: skip


def measure(request: Request, wanted: Names) -> Measured:
    chosen = request.settings
    seconds: dict[str, list[float]] = {str(count): [] for count in COUNTS}
    with tempfile.TemporaryDirectory() as folder:
        parts = {count: Path(folder) / f"{count}.json" for count in COUNTS}
        for _ in range(chosen["rounds"]):
            for count, part in parts.items():
                start_processes(chosen, count, part)
                seconds[str(count)].append(float(json.loads(part.read_text())["seconds"]))
        one, other = (read_scores(part.with_suffix(".safetensors")).groups for part in parts.values())
    pairs = [(getattr(one[group], name), getattr(other[group], name)) for group in one for name in STATISTICS]
    difference = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
    yield "estimation", {"seconds": seconds, "largest_difference": difference}


def start_processes(chosen: Values, count: int, part: Path) -> None:
    """Estimate in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run([*command, json.dumps(chosen), str(part)], check=True, env=environment)


def estimate_once(chosen: Values, part: Path) -> None:
    """What each process does; the first one writes the seconds, and the scores next to them."""
    torch.set_num_threads(1)
    with quick_float32_products():
        processes = Processes.found()
        backend, samples = opened(chosen, processes)
        estimate(backend, first(samples, 2 * processes.count))
        processes.barrier()
        start = time.perf_counter()
        scores = estimate(backend, samples)
        seconds = time.perf_counter() - start
        if processes.first:
            write_scores(part.with_suffix(".safetensors"), scores)
            part.write_text(json.dumps({"seconds": seconds}))


def summarise(cells: Cells) -> Values:
    least = {count: min(seconds) for count, seconds in cells["estimation"]["seconds"].items()}
    return {
        "seconds": least, "speedup": {count: least["1"] / seconds for count, seconds in least.items()},
        "most": max(least, key=int), "difference": cells["estimation"]["largest_difference"],
    }  # fmt: skip


if __name__ == "__main__":
    estimate_once(json.loads(sys.argv[1]), Path(sys.argv[2]))
