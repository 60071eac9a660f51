"""Group sizes of the quantised tuning: perplexity, memory, time, size; and what group-wise training costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.charts import lines
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import in_own_process, made_by_saap, pruned_folder
from lab.one_training import Training, train
from lab.training import TRIAL, Size, train_into

import saap
from experiments.cost import speed
from saap.core.errors import GroupSizeError
from saap.discovery.blocks import find_blocks
from saap.models.checkpoint.groupwise import linears_inside
from saap.recovery.quantise import check_group_sizes
from saap.reporting.figures import Figure

GROUP_SIZES = (16, 32, 64, 128)
PLAIN = "plain LoRA"
GRIDS = OWN_GRID, OFF_GRID, TRAINED_HERE = ("4 bits, 32", "none", "none, a small model trained here")
SMALL = Size(layers=4, width=256, inner=1024, steps=300)
"""Of sizes that every group size divides."""
COST_STEPS, COST_ROUNDS = 8, 3
COSTS = {"groupwise": (False, True), "groupwise, no scales": (False, False), PLAIN: (True, True)}
"""Whether it is plain LoRA, and whether scales are trained."""
UNPACKED, PACKED = "f16", "q4_1"
"""Types of llama.cpp: of merged weights, and the one that holds groups of 32 as they are."""


def settings(request: Request) -> Values:
    quick = request.quick
    return {
        "model": request.model, "length": 64 if quick else 512, "tokens": 256 if quick else 16384,
        "evaluated tokens": 1024 if quick else 4096,
    }  # fmt: skip


def cells(request: Request) -> list[str]:
    kinds = [*map(str, GROUP_SIZES), PLAIN]
    return [f"{grid} | {kind}" for grid in GRIDS for kind in kinds] + [f"cost | {kind}" for kind in COSTS]


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    """Equal tokens without a teacher, each training in a process of its own."""
    chosen = settings(request)
    for cell in wanted:
        grid, _, kind = cell.partition(" | ")
        if grid == "cost":
            yield cell, cost_of(request, kind)
            continue
        model = weights_on(grid, request)
        refused = None if kind == PLAIN else refusal(model, int(kind))
        if refused:
            yield cell, {"refused": refused}
            continue
        found = in_own_process(train, Training(
            model=model, plain=kind == PLAIN, steps=chosen["tokens"] // chosen["length"], length=chosen["length"],
            evaluation_tokens=chosen["evaluated tokens"], group_size=32 if kind == PLAIN else int(kind),
            tasks=request.given.get("tasks") if grid == OFF_GRID else None,
        ))  # fmt: skip
        yield cell, {**found, "seconds_a_step": statistics.median(found.pop("step_seconds"))}


def weights_on(grid: str, request: Request) -> str:
    """The model whose weights lie on `grid`: of the package, the same after a short plain LoRA tuning, or a new one."""
    if grid == OWN_GRID:
        return request.model
    if grid == TRAINED_HERE:
        folder = request.work / f"group-sizes-{'quick' if request.quick else 'small'}"
        if not (folder / "config.json").is_file():
            train_into(folder, "llama", TRIAL if request.quick else SMALL, short=request.quick)
        return str(folder)
    steps, length = "4" if request.quick else "40", str(settings(request)["length"])
    tuned = ["--tuning", "lora", "--max-steps", steps, "--dtype", "float32", "--length", length]
    name = f"off-grid-{steps}-{Path(request.model).name}"
    return str(made_by_saap(request, name, ["recover", request.model, "--data", "mixed", *tuned]))


def refusal(model: str, group_size: int) -> str | None:
    """Why groups of that size do not fit the matrices of the model; None if they do."""
    loaded = saap.load(model)
    try:
        check_group_sizes(linears_inside(loaded, find_blocks(loaded)), group_size)
    except GroupSizeError as error:
        return error.offender
    return None


def cost_of(request: Request, kind: str) -> dict[str, Any]:
    """Peak memory above the imports and seconds of a step, of the pruned model: medians of the rounds."""
    model = str(pruned_folder(request, "--effort", "fast", name="fast"))
    chosen, steps = settings(request), 4 if request.quick else COST_STEPS
    plain, scales = COSTS[kind]
    training = Training(model=model, plain=plain, scales=scales, steps=steps, length=chosen["length"], threads=1)
    runs = [in_own_process(train, training) for _ in range(1 if request.quick else COST_ROUNDS)]
    return {
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "seconds_a_step": statistics.median(value for run in runs for value in run["step_seconds"]),
    }


def summarise(found: Cells) -> dict[str, Any]:
    of = {tuple(name.split(" | ")): cell for name, cell in found.items() if " | " in name}
    rows = [
        {"source_grid": grid, "group_size": kind, **cell}
        for (grid, kind), cell in of.items()
        if grid != "cost" and "refused" not in cell
    ]
    off_grid = [row for row in rows if row["source_grid"] == OFF_GRID]
    grouped, plain = [row for row in off_grid if row["group_size"] != PLAIN], of[OFF_GRID, PLAIN]
    best = min(grouped, key=lambda row: float(row["perplexity"]))
    largest = max(grouped, key=lambda row: int(row["group_size"]))
    cost = {kind: of["cost", kind] for kind in COSTS}
    return {
        "rows": rows,
        "refused": {(cell["refused"], kind): None for (_, kind), cell in of.items() if "refused" in cell},
        "tasks": list(plain.get("tasks", {})),
        "zero_shot": {row["group_size"]: _mean_accuracy(row) for row in off_grid if row.get("tasks")},
        "decode": speed.dense_decoding(found, (UNPACKED, PACKED)),
        "best": best,
        "largest": largest,
        "plain_perplexity": {grid: of[grid, PLAIN]["perplexity"] for grid in GRIDS},
        "best_over_plain": best["perplexity"] / plain["perplexity"],
        "largest_over_best": largest["perplexity"] / best["perplexity"],
        "bytes_saved": 1 - largest["weight_bytes"] / best["weight_bytes"],
        "cost": {
            kind: {
                **one,
                "memory_ratio": one["peak_bytes"] / cost[PLAIN]["peak_bytes"],
                "time_ratio": one["seconds_a_step"] / cost[PLAIN]["seconds_a_step"],
            }
            for kind, one in cost.items()
        },
    }


def _mean_accuracy(row: Values) -> list[float]:
    """Mean accuracy over the tasks of a row, and its standard error."""
    tasks = row["tasks"].values()
    spread = math.sqrt(sum(task["acc_stderr"] ** 2 for task in tasks)) / len(tasks)
    return [sum(task["acc"] for task in tasks) / len(tasks), spread]


def figures(summary: Values) -> Sequence[Figure]:
    series = {}
    for grid in GRIDS:
        rows = [row for row in summary["rows"] if row["source_grid"] == grid and row["group_size"] != PLAIN]
        plain = summary["plain_perplexity"][grid]
        places = [float(row["group_size"]) for row in rows]
        series[f"tuned, grid: {grid}"] = (places, [row["perplexity"] / plain for row in rows])
        series[f"only quantised, grid: {grid}"] = (places, [row["perplexity_quantised"] / plain for row in rows])
    figure = lines(
        "group-sizes", "Perplexity against the group size",
        "Perplexity on WikiText-2 of the quantised model, over that of plain LoRA on the same weights, against the "
        "number of inputs that share a scale.",
        series, x="inputs that share a scale and a zero point", y="perplexity / plain LoRA", log="x", ticks=True,
    )  # fmt: skip
    return (figure,)


EXPERIMENT = Experiment(
    name="group-sizes", cells=cells, settings=settings, measure=measure, summarise=summarise, figures=figures,
    options={"tasks": "DIR"}, reads=(speed.EXPERIMENT,), smoke=False,
)  # fmt: skip
