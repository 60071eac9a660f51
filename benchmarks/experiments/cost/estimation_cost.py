"""Cost of the estimation: time versus a plain forward and backward pass, memory above the loaded model.

Random token ids; float32. Memory: peak resident size minus that of the loaded model at rest (every weight touched,
freed heap returned).
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from harness.digests import PRUNING
from harness.experiment import Cells, Measured, Names, Request, Scaled, Values
from lab.commands import in_own_process
from lab.memory import Peak

from saap.core.records import CalibrationSet
from saap.discovery import discover
from saap.estimation.estimate import estimate
from saap.models.loading.pretrained import load_model
from saap.models.loading.references import resolve_model
from saap.models.walk.backend import Backend
from saap.models.walk.processes import Processes
from saap.models.walk.walker import inference_only

CELLS = ["time", "memory"]
SMOKE = False
SETTINGS = {
    "model": "{model}", "samples": Scaled(4, 50), "length": Scaled(32, 128), "micro batch": 2,
    "threads": 2, "rounds": 1,
}  # fmt: skip
DECIDED_BY = PRUNING


def measure(request: Request, wanted: Names) -> Measured:
    for cell in wanted:
        yield cell, in_own_process(time_of if cell == "time" else memory_of, request.settings)


def opened(chosen: Values, processes: Processes | None = None) -> tuple[Backend, CalibrationSet]:
    """The model in float32 with its structures, and random samples."""
    torch.set_num_threads(chosen.get("threads", 1))
    model: Any = load_model(resolve_model(chosen["model"]), device=torch.device("cpu"), dtype=torch.float32)
    shape = chosen["samples"], chosen["length"]
    tokens = np.random.default_rng(0).integers(5, model.config.vocab_size, shape)
    backend = Backend(model, discover(model), processes or Processes())
    return backend, CalibrationSet(sources=("random",), seed=0, tokens=tokens)


def first(samples: CalibrationSet, count: int) -> CalibrationSet:
    """For a warm-up pass."""
    return CalibrationSet(sources=samples.sources, seed=0, tokens=samples.tokens[:count])


def time_of(chosen: Values) -> dict[str, float]:
    backend, samples = opened(chosen)
    rows = chosen["micro batch"]

    def plain(samples: CalibrationSet) -> None:
        backend.model.requires_grad_(True)
        for batch in torch.split(torch.from_numpy(samples.tokens), rows):
            backend.model(batch, labels=batch, use_cache=False).loss.backward()
        backend.model.zero_grad(set_to_none=True)

    ours = partial(estimate, backend, micro_batch=rows)
    passes: dict[str, Callable[[CalibrationSet], object]] = {"plain": plain, "estimation": ours}
    seconds, used = {}, {}
    for name, run in passes.items():
        run(first(samples, rows))
        start, before = time.perf_counter(), time.process_time()
        run(samples)
        seconds[name], used[name] = time.perf_counter() - start, time.process_time() - before
    return {
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "time_ratio": seconds["estimation"] / seconds["plain"], "cpu_ratio": used["estimation"] / used["plain"],
    }  # fmt: skip


def memory_of(chosen: Values) -> dict[str, float]:
    backend, samples = opened(chosen)
    backend.model.requires_grad_(False)
    with inference_only(backend.model):
        weights = sum(parameter.nbytes for parameter in backend.model.parameters() if parameter.sum() is not None)
    with Peak() as peak:
        estimate(backend, samples, micro_batch=chosen["micro batch"])
    above = peak.bytes - peak.before
    return {"weight_bytes": weights, "above_bytes": above, "memory_ratio": above / weights}


def summarise(cells: Cells) -> Values:
    return {**cells["time"], **cells["memory"]}
