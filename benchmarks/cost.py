"""How time and memory of `saap prune` grow with the model, the tokens and the ratio, in memory and offloaded.

    python benchmarks/cost.py            # about 10 minutes on 2 idle cores
    python benchmarks/cost.py --table    # table, chart and exponents again, from benchmarks/results/cost.json

LLaMA shapes with random weights in float32. One thing is varied at a time; each run is a process of its own. Time is that
of the processor, so that other work on the machine matters less. An exponent is the slope of a straight line through the
logarithms (least squares); memory is that above the process before it opens the model. Writes
benchmarks/results/cost.json, benchmarks/cost.svg and the table in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from readme_tables import write_between_marks
from shapes import Shape, write_checkpoint

from saap.config import PruneConfig
from saap.pipeline import memory
from saap.pipeline.inputs import RunOptions
from saap.pipeline.run import run_prune

HERE = Path(__file__).resolve().parent
RESULT, CHART = HERE / "results" / "cost.json", HERE / "cost.svg"
VOCABULARY = 2048
ESTIMATION = "estimate the importance of every unit"
CUTTING = "cut"


@dataclass(frozen=True)
class Point:
    """One run. layers: of the shape. samples: of 64 tokens each."""

    layers: int = 16
    samples: int = 16
    ratio: float = 0.2
    offloaded: bool = False


BASE = Point()
CURVES: dict[str, list[Point]] = {
    "layers": [replace(BASE, layers=layers) for layers in (8, 16, 32)],
    "samples": [replace(BASE, samples=samples) for samples in (8, 16, 32, 64)],
    "ratio": [replace(BASE, ratio=ratio) for ratio in (0.1, 0.2, 0.3, 0.4)],
}


def shape_of(layers: int) -> Shape:
    return Shape(hidden=512, ffn=1408, layers=layers, heads=8, vocabulary=VOCABULARY)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        RESULT.write_text(json.dumps(measure_all(), indent=1) + "\n")
    found = json.loads(RESULT.read_text())
    draw(found["points"])
    write_between_marks("cost", table(found["points"]))


def measure_all() -> dict[str, Any]:
    points = {point for curve in CURVES.values() for point in curve}
    both = sorted({replace(point, offloaded=away) for point in points for away in (False, True)}, key=str)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        for layers in {point.layers for point in both}:
            (Path(folder) / str(layers)).mkdir()
            write_checkpoint(shape_of(layers), Path(folder) / str(layers), dtype=torch.float32)
        context = multiprocessing.get_context("fork")  # so that each run does not import everything anew
        measured = []
        for point in both:
            ours, theirs = context.Pipe()
            child = context.Process(target=run_one, args=(point, Path(folder), theirs))
            child.start()
            measured.append({**asdict(point), **ours.recv()})
            child.join()
    environment = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": [load, os.getloadavg()[0]]}
    return {"points": measured, "environment": environment}


def run_one(point: Point, folder: Path, answer: Any) -> None:
    """In a process of its own: one run, and what it took."""
    shape = shape_of(point.layers)
    tokens = np.random.default_rng(0).integers(17, VOCABULARY, (point.samples + 64, 64))
    limit = None
    if point.offloaded:  # as if the machine were so small
        memory.resident_need = lambda sizes, config: 10**15
        limit = 10**12
    config = PruneConfig(
        pruning_ratios=(point.ratio,), samples=point.samples, sample_length=64, effort="fast", refit_tokens=1024,
        calibration=("given from Python",),
    )  # fmt: skip
    empty = memory.process_bytes()
    before, start = os.times(), time.perf_counter()
    out = folder / f"out-{os.getpid()}"
    (result,) = run_prune(
        folder / str(point.layers), config, RunOptions(out=out, max_memory=limit, device="cpu"), calibration=tokens
    )
    after = os.times()
    stages = {stage.name.split(",")[0]: stage for stage in result.report.stages}
    answer.send(
        {
            "parameters": shape.parameters,
            "seconds": time.perf_counter() - start,
            "processor_seconds": after.user + after.system - before.user - before.system,
            "empty_bytes": empty,
            "peak_bytes": max(stage.peak_resident_bytes for stage in stages.values()) - empty,
            "estimation_bytes": stages[ESTIMATION].peak_resident_bytes - empty,
        }
    )
