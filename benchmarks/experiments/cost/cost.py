"""How time and memory of `saap prune` grow with the model, the tokens and the ratio, in memory and offloaded.

Each run is a process forked from one that is warmed up. Processor time, so that other load on the machine matters less.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from harness.charts import lines
from harness.experiment import Cells, Figures, Measured, Names, Request, Values
from lab.checkpoints import llama, write_checkpoint
from lab.commands import in_own_process

from saap.models.loading.memory import of_process
from saap.models.loading.references import resolve_model
from saap.pipeline.prune.run import run_prune
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.memory_limit import limits
from saap.settings.presets import Preset
from saap.settings.prune import PruneConfig

VOCABULARY = 2048
ESTIMATION = "estimate the importance of every unit"


class Point(NamedTuple):
    """One run. layers: of the shape. samples: of 64 tokens each."""

    layers: int = 16
    samples: int = 16
    ratio: float = 0.2

    def cell(self, place: str) -> str:
        return f"{self.layers} layers, {self.samples} samples, ratio {self.ratio:g}, {place}"


CURVES = {
    "layers": [Point(layers=layers) for layers in (8, 16, 32)],
    "samples": [Point(samples=samples) for samples in (8, 16, 32, 64)],
    "ratio": [Point(ratio=ratio) for ratio in (0.1, 0.2, 0.3, 0.4)],
}
TITLES = {"layers": "layers (model size)", "samples": "samples of 64 tokens", "ratio": "pruning ratio"}
PLACES = ("in memory", "offloaded")
RUNS = {point.cell(place): (point, place) for curve in CURVES.values() for point in curve for place in PLACES}
CELLS = list(RUNS)
SMOKE = False
MEASURED = {
    "processor_seconds": ("processor time, s", 1.0),
    "estimation_bytes": ("memory of the estimation, MB", 1e6),
    "peak_bytes": ("peak memory, MB", 1e6),
}


def measure(request: Request, wanted: Names) -> Measured:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for layers in {point.layers for point, _ in RUNS.values()}:
            write_checkpoint(llama(256, 704, layers, 8, VOCABULARY), folder / str(layers), dtype=torch.float32)
        run_one(Point(), False, folder)  # imports everything, also for the forked processes
        for cell in wanted:
            point, place = RUNS[cell]
            found = in_own_process(run_one, point, place == "offloaded", folder, start="fork")
            yield cell, {**found, **point._asdict()}


def run_one(point: Point, offloaded: bool, folder: Path) -> dict[str, float]:
    tokens = np.random.default_rng(0).integers(17, VOCABULARY, (point.samples + 64, 64))
    config = PruneConfig(
        pruning_ratios=(point.ratio,), samples=point.samples, sample_length=64, preset=Preset.FAST, refit_tokens=1024,
        calibration=("given from Python",),
    )  # fmt: skip
    source = folder / str(point.layers)
    limit = None
    if offloaded:  # half of the memory without offloading, so that weights stay in their files
        limit = sum(limits(resolve_model(source), config, torch.float32, torch.device("cpu"))) // 2
    empty, used, start = of_process(), time.process_time(), time.perf_counter()
    with TemporaryDirectory(dir=folder) as temporary:
        options = RunOptions(out=Path(temporary) / "out", max_memory=limit, device="cpu")
        (result,) = run_prune(source, config, options, calibration=tokens)
    stages = {stage.name.split(",")[0]: stage.peak_resident_bytes for stage in result.report.stages}
    return {
        "seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - used,
        "peak_bytes": max(stages.values()) - empty, "estimation_bytes": stages[ESTIMATION] - empty,
    }  # fmt: skip


def summarise(cells: Cells) -> Values:
    rows: list[dict[str, Any]] = []
    for name, points in CURVES.items():
        places = [float(getattr(point, name)) for point in points]
        for figure, (label, unit) in MEASURED.items():
            curves = {place: [cells[point.cell(place)][figure] / unit for point in points] for place in PLACES}
            # slopes of straight lines through the logarithms
            slopes = {place: float(np.polyfit(np.log(places), np.log(y), 1)[0]) for place, y in curves.items()}
            rows.append({
                "varied": name, "title": TITLES[name], "places": places, "figure": figure, "label": label,
                "curves": curves, "exponents": slopes,
            })  # fmt: skip
    by_layers = {row["figure"]: row["exponents"] for row in rows if row["varied"] == "layers"}
    times = [row["curves"] for row in rows if row["figure"] == "processor_seconds"]
    pairs = [pair for curves in times for pair in zip(*(curves[place] for place in PLACES), strict=True)]
    return {
        "rows": rows, "memory": by_layers["peak_bytes"], "time": by_layers["processor_seconds"],
        "longer": max(offloaded / here - 1 for here, offloaded in pairs),
    }  # fmt: skip


def figures(summary: Values) -> Figures:
    kinds = {"processor_seconds": "time", "peak_bytes": "memory"}
    drawn = []
    for row in summary["rows"]:
        if row["figure"] in kinds:
            series = {f"{p}, x^{row['exponents'][p]:.2f}": (row["places"], row["curves"][p]) for p in PLACES}
            name = f"cost-{row['varied']}-{kinds[row['figure']]}"
            drawn.append(lines(name, series, x=row["title"], y=row["label"], ticks=True))
    return drawn
