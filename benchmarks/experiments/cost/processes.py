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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.experiment import Cells, Experiment, Measured, Request, Values
from harness.store import ROOT

from saap.core.records import CalibrationSet
from saap.core.storage import read_scores, write_scores
from saap.discovery import discover
from saap.estimation.estimate import estimate
from saap.models.loading.devices import quick_float32_products
from saap.models.loading.pretrained import load_model
from saap.models.loading.references import resolve_model
from saap.models.walk.backend import Backend
from saap.models.walk.processes import Processes

COUNTS = (1, 2)
STATISTICS = ("vector", "vector_m2", "element", "element_m2", "comoment")


def settings(request: Request) -> Values:
    return {
        "model": request.model, "samples": 4 if request.quick else 50, "length": 32 if request.quick else 128,
        "rounds": 1 if request.quick else 2,
    }  # fmt: skip


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    chosen = settings(request)
    seconds: dict[str, list[float]] = {str(count): [] for count in COUNTS}
    with tempfile.TemporaryDirectory() as folder:
        parts = {count: Path(folder) / f"{count}.json" for count in COUNTS}
        for _ in range(chosen["rounds"]):
            for count, part in parts.items():
                seconds[str(count)].append(run(chosen, count, part))
        difference = largest_difference(*(part.with_suffix(".safetensors") for part in parts.values()))
    yield "estimation", {"seconds": seconds, "largest_difference": difference}


def run(chosen: Values, count: int, part: Path) -> float:
    """Seconds of the estimation in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run([*command, json.dumps(chosen), str(part)], check=True, env=environment)
    return float(json.loads(part.read_text())["seconds"])


def estimate_once(chosen: Values, part: Path) -> None:
    """What each process does; the first one writes the seconds, and the scores next to them."""
    torch.set_num_threads(1)
    with quick_float32_products():
        processes = Processes.found()
        model: Any = load_model(resolve_model(chosen["model"]), device=torch.device("cpu"), dtype=torch.float32)
        graph = discover(model)
        shape = chosen["samples"], chosen["length"]
        tokens = np.random.default_rng(0).integers(5, model.config.vocab_size, shape)
        samples = CalibrationSet(sources=("random",), seed=0, tokens=tokens)
        few = CalibrationSet(sources=("random",), seed=0, tokens=tokens[: 2 * processes.count])
        estimate(Backend(model, graph, processes), few)
        processes.barrier()
        start = time.perf_counter()
        scores = estimate(Backend(model, graph, processes), samples)
        seconds = time.perf_counter() - start
        if processes.first:
            write_scores(part.with_suffix(".safetensors"), scores)
            part.write_text(json.dumps({"seconds": seconds}))


def largest_difference(first: Path, second: Path) -> float:
    """Of all statistics, relative to the largest of its group."""
    one, other = read_scores(first).groups, read_scores(second).groups
    pairs = [(getattr(one[group], name), getattr(other[group], name)) for group in one for name in STATISTICS]
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def summarise(cells: Cells) -> dict[str, Any]:
    found = cells["estimation"]
    least = {count: min(seconds) for count, seconds in found["seconds"].items()}
    speedups = {count: least["1"] / seconds for count, seconds in least.items()}
    return {
        "seconds": least,
        "speedup": speedups,
        "most": max(least, key=int),
        "difference": found["largest_difference"],
    }


EXPERIMENT = Experiment(
    name="processes", cells=lambda request: ["estimation"], settings=settings, measure=measure, summarise=summarise
)

if __name__ == "__main__":
    estimate_once(json.loads(sys.argv[1]), Path(sys.argv[2]))
