"""How time and memory of `saap prune` grow with the model, the tokens and the ratio, in memory and offloaded.

    python benchmarks/cost.py            # some minutes on an idle machine; goes on where it was stopped
    python benchmarks/cost.py --table    # table, chart and exponents again, from benchmarks/results/cost.json

LLaMA shapes with random weights in float32. One thing is varied at a time; each run is a process of its own. Time is
that of the processor, so that other work on the machine matters less. An exponent is the slope of a straight line
through the logarithms (least squares); memory is that above the process before it opens the model. Writes
benchmarks/results/cost.json, benchmarks/cost.svg and the table in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from readme_tables import write_between_marks
from shapes import Shape, write_checkpoint

from saap.models.loading.references import resolve_model
from saap.pipeline.prune.run import run_prune
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.memory import limits
from saap.settings.prune import Effort, PruneConfig

HERE = Path(__file__).resolve().parent
RESULT, CHART = HERE / "results" / "cost.json", HERE / "cost.svg"
VOCABULARY = 2048
ESTIMATION = "estimate the importance of every unit"


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
    return Shape(hidden=256, ffn=704, layers=layers, heads=8, vocabulary=VOCABULARY)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        measure_all()
    found = json.loads(RESULT.read_text())
    draw(found["points"])
    write_between_marks("cost", table(found["points"]))


def measure_all() -> None:
    """Measure the points that are not in the file of results yet."""
    points = {point for curve in CURVES.values() for point in curve}
    both = sorted({replace(point, offloaded=away) for point in points for away in (False, True)}, key=str)
    measured = json.loads(RESULT.read_text())["points"] if RESULT.exists() else []
    known = [{key: one[key] for key in asdict(BASE)} for one in measured]
    environment = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        for layers in {point.layers for point in both}:
            (Path(folder) / str(layers)).mkdir()
            write_checkpoint(shape_of(layers), Path(folder) / str(layers), dtype=torch.float32)
        run_one(BASE, Path(folder), None)  # loads all that a run imports, for the forked processes as well
        context = multiprocessing.get_context("fork")
        for point in both:
            if asdict(point) in known:
                continue
            ours, theirs = context.Pipe()
            child = context.Process(target=run_one, args=(point, Path(folder), theirs))
            child.start()
            theirs.close()  # so that a child that fails does not leave us waiting
            measured.append({**asdict(point), **ours.recv(), "load": os.getloadavg()[0]})
            child.join()
            print(measured[-1], flush=True)
            RESULT.write_text(json.dumps({"points": measured, "environment": environment}, indent=1) + "\n")


def run_one(point: Point, folder: Path, answer: Any) -> None:
    """In a process of its own: one run, and what it took."""
    shape = shape_of(point.layers)
    tokens = np.random.default_rng(0).integers(17, VOCABULARY, (point.samples + 64, 64))
    config = PruneConfig(
        pruning_ratios=(point.ratio,), samples=point.samples, sample_length=64, effort=Effort.FAST, refit_tokens=1024,
        calibration=("given from Python",),
    )  # fmt: skip
    source = folder / str(point.layers)
    limit = (
        sum(limits(resolve_model(source), config, torch.float32, torch.device("cpu"))) // 2 if point.offloaded else None
    )
    empty = resident_bytes()
    before, start = os.times(), time.perf_counter()
    out = folder / f"out-{os.getpid()}"
    (result,) = run_prune(source, config, RunOptions(out=out, max_memory=limit, device="cpu"), calibration=tokens)
    after = os.times()
    stages = {stage.name.split(",")[0]: stage for stage in result.report.stages}
    shutil.rmtree(out)
    if answer is None:
        return
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


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def curve_of(points: list[dict[str, Any]], name: str, *, offloaded: bool) -> list[dict[str, Any]]:
    wanted = [asdict(replace(point, offloaded=offloaded)) for point in CURVES[name]]
    found = [next(one for one in points if all(one[key] == value for key, value in want.items())) for want in wanted]
    return sorted(found, key=lambda one: float(one[name]))


def exponent(curve: list[dict[str, Any]], name: str, figure: str) -> float:
    """Slope of log figure over log of what was varied."""
    x, y = ([float(one[key]) for one in curve] for key in (name, figure))
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


FIGURES = {
    "processor_seconds": ("processor time, s", 1.0),
    "estimation_bytes": ("memory of the estimation, MB", 1e6),
    "peak_bytes": ("peak memory, MB", 1e6),
}
NAMES = {"layers": "layers (model size)", "samples": "samples of 64 tokens", "ratio": "pruning ratio"}


def table(points: list[dict[str, Any]]) -> str:
    rows = ["| varied | figure | in memory | exponent | offloaded | exponent |", "|---|---|---|---|---|---|"]
    for name, title in NAMES.items():
        here, away = (curve_of(points, name, offloaded=offloaded) for offloaded in (False, True))
        values = ", ".join(f"{one[name]:g}" for one in here)
        for figure, (label, unit) in FIGURES.items():
            cells = []
            for curve in (here, away):
                cells.append(", ".join(f"{one[figure] / unit:.3g}" for one in curve))
                cells.append(f"{exponent(curve, name, figure):.2f}")
            rows.append(f"| {title}: {values} | {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(points: list[dict[str, Any]]) -> None:
    matplotlib.use("svg")
    pyplot.rcParams["svg.hashsalt"] = "cost"  # the same figures give the same file
    figure, axes = pyplot.subplots(2, len(NAMES), figsize=(11, 6), layout="constrained")
    for column, (name, title) in enumerate(NAMES.items()):
        for row, key in enumerate(("processor_seconds", "peak_bytes")):
            label, unit = FIGURES[key]
            for offloaded, style in ((False, "o-"), (True, "s--")):
                curve = curve_of(points, name, offloaded=offloaded)
                x, y = [one[name] for one in curve], [one[key] / unit for one in curve]
                power = exponent(curve, name, key)
                axes[row][column].plot(x, y, style, label=f"{'offloaded' if offloaded else 'in memory'}, x^{power:.2f}")
            axes[row][column].set(xlabel=title, ylabel=label, ylim=(0, None))
            axes[row][column].legend()
    figure.savefig(CHART, metadata={"Date": None})


if __name__ == "__main__":
    main()
