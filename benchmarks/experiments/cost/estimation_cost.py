"""What the estimation costs: time against a plain forward and backward pass, memory above the loaded model.

Random token ids; float32. Time: estimation and loss.backward() with weight gradients over the same tokens in the same
batches, interleaved, medians. Memory: a process of its own; peak resident size while estimating, minus that of the
loaded model at rest (every weight touched, freed heap given back), relative to the bytes of the weights.
"""

from __future__ import annotations

import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.charts import bars
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import in_own_process
from lab.dense import open_dense
from lab.memory import Peak, give_back

from experiments.quality import comparison
from saap.core.records import CalibrationSet
from saap.estimation.estimate import estimate
from saap.models.loading.pretrained import load_model
from saap.models.loading.references import resolve_model
from saap.models.walk.backend import Backend
from saap.models.walk.walker import inference_only
from saap.reporting.figures import Figure


def settings(request: Request) -> Values:
    quick = request.quick
    return {
        "model": request.model, "samples": 4 if quick else 50, "length": 32 if quick else 128, "micro batch": 2,
        "threads": 2, "rounds": 1,
    }  # fmt: skip


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    chosen = settings(request)
    request.work.mkdir(parents=True, exist_ok=True)
    graph = request.work / "graph.pickle"
    graph.write_bytes(pickle.dumps(in_own_process(graph_of, request.model)))
    works: dict[str, Callable[..., dict[str, float]]] = {"time": time_of, "memory": memory_of}
    for cell in wanted:
        yield cell, in_own_process(works[cell], graph, chosen)


def graph_of(model: str) -> Any:
    return open_dense(model).graph


def opened(chosen: Values) -> tuple[Any, CalibrationSet]:
    """The model in float32 and random samples."""
    torch.set_num_threads(chosen["threads"])
    model: Any = load_model(resolve_model(chosen["model"]), device=torch.device("cpu"), dtype=torch.float32)
    shape = chosen["samples"], chosen["length"]
    tokens = np.random.default_rng(0).integers(5, model.config.vocab_size, shape)
    return model, CalibrationSet(sources=("random",), seed=0, tokens=tokens)


def time_of(graph_file: Path, chosen: Values) -> dict[str, float]:
    model, samples = opened(chosen)
    graph, rows = pickle.loads(graph_file.read_bytes()), chosen["micro batch"]
    few = CalibrationSet(sources=("random",), seed=0, tokens=samples.tokens[: max(2, rows)])
    passes: dict[str, Callable[[CalibrationSet], object]] = {
        "plain": lambda tokens: plain_pass(model, tokens.tokens, rows),
        "estimation": lambda tokens: estimate(Backend(model, graph), tokens, micro_batch=rows),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
    for run in passes.values():
        run(few)
    for _ in range(chosen["rounds"]):
        for name, run in passes.items():
            start = time.perf_counter(), time.process_time()
            run(samples)
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            model.zero_grad(set_to_none=True)
    (plain, plain_cpu), (ours, ours_cpu) = (
        tuple(statistics.median(column) for column in zip(*pairs, strict=True)) for pairs in seconds.values()
    )
    return {
        "plain_seconds": plain, "estimation_seconds": ours,
        "time_ratio": ours / plain, "cpu_ratio": ours_cpu / plain_cpu,
    }  # fmt: skip


def plain_pass(model: torch.nn.Module, tokens: np.ndarray, rows: int) -> None:
    model.requires_grad_(True)
    for batch in torch.split(torch.from_numpy(tokens), rows):
        model(batch, labels=batch, use_cache=False).loss.backward()


def memory_of(graph_file: Path, chosen: Values) -> dict[str, float]:
    model, samples = opened(chosen)
    model.requires_grad_(False)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with inference_only(model):
        for parameter in model.parameters():
            parameter.sum()
    graph = pickle.loads(graph_file.read_bytes())
    give_back()
    with Peak() as peak:
        estimate(Backend(model, graph), samples, micro_batch=chosen["micro batch"])
    above = peak.bytes - peak.before
    return {"weight_bytes": weights, "above_bytes": above, "memory_ratio": above / weights}


def summarise(cells: Cells) -> dict[str, Any]:
    scored = {
        row["method"]: row["seconds"]["score"]
        for row in comparison.rows_of(cells)
        if row["ratio"] == 0.2 and not row["restored"]
    }
    quickest = min((method for method in scored if method != "saap"), key=lambda method: float(scored[method]))
    head = cells[comparison.HEAD]["settings"]
    return {
        **cells["time"],
        **cells["memory"],
        "score_seconds": scored,
        "ours_seconds": scored["saap"],
        "quickest": quickest,
        "quickest_seconds": scored[quickest],
        "samples": head["samples"],
        "sample_length": head["sample_length"],
    }


def figures(summary: Values) -> Sequence[Figure]:
    methods = list(summary["score_seconds"])
    figure = bars(
        "estimation-cost", "Seconds to score every unit",
        "Seconds that each method takes to score all units from the same calibration samples.",
        {"seconds": [summary["score_seconds"][method] for method in methods]}, methods, x="seconds",
    )  # fmt: skip
    return (figure,)


EXPERIMENT = Experiment(
    name="estimation-cost", cells=lambda request: ["time", "memory"], settings=settings, measure=measure,
    summarise=summarise, figures=figures, reads=(comparison.EXPERIMENT,), smoke=False,
)  # fmt: skip
