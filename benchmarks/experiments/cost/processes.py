"""Speed-up of the estimation by several processes, one thread each, on an idle machine with as many cores.

Timed from the moment when all processes are ready until all have the whole result; the minimum of the rounds counts.
"""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from harness.digests import MAKING
from harness.experiment import Cells, Measured, Names, Request, Scaled, Values
from lab.commands import in_own_process

from experiments.cost.estimation_cost import first, opened
from saap.core.records import ImportanceScores
from saap.estimation.estimate import estimate
from saap.models.loading.devices import quick_float32_products
from saap.models.walk.processes import Processes

COUNTS = (1, 2)
STATISTICS = ("vector", "vector_m2", "element", "element_m2", "comoment")
CELLS = ["estimation"]
SETTINGS = {
    "model": "{model}", "samples": Scaled(4, 50), "length": Scaled(32, 128), "rounds": Scaled(1, 2),
}  # fmt: skip
DECIDED_BY = MAKING


def measure(request: Request, wanted: Names) -> Measured:
    seconds: dict[str, list[float]] = {str(count): [] for count in COUNTS}
    scores: list[ImportanceScores] = []
    for _ in range(request.settings["rounds"]):
        for count in COUNTS:
            took, found = estimate_in(count, request.settings)
            seconds[str(count)].append(took)
            scores.append(found)
    one, other = (found.groups for found in scores[-2:])
    pairs = [(getattr(one[group], name), getattr(other[group], name)) for group in one for name in STATISTICS]
    difference = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
    yield "estimation", {"seconds": seconds, "largest_difference": difference}


def estimate_in(count: int, chosen: Values) -> tuple[float, ImportanceScores]:
    """Seconds and scores of the estimation with this number of processes."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ThreadPoolExecutor(count) as pool:
        return next(iter(pool.map(partial(in_own_process, estimate_once, chosen, together), range(count))))


def estimate_once(chosen: Values, together: dict[str, str], rank: int) -> tuple[float, ImportanceScores]:
    os.environ |= {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    with quick_float32_products():
        processes = Processes.found()
        backend, samples = opened(chosen, processes)
        estimate(backend, first(samples, 2 * processes.count))
        processes.barrier()
        start = time.perf_counter()
        scores = estimate(backend, samples)
        return time.perf_counter() - start, scores


def summarise(cells: Cells) -> Values:
    least = {count: min(seconds) for count, seconds in cells["estimation"]["seconds"].items()}
    return {
        "seconds": least, "speedup": {count: least["1"] / seconds for count, seconds in least.items()},
        "most": max(least, key=int), "difference": cells["estimation"]["largest_difference"],
    }  # fmt: skip
