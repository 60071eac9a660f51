"""Group sizes of quantised tuning: perplexity, memory, time and size."""

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from harness.charts import lines
from harness.digests import MAKING
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.commands import in_own_process, made_by_saap
from lab.texts import TEXTS
from lab.training import TRIAL, Size, train_into

import saap
from experiments.cost import speed
from experiments.cost.training_cost import train
from saap.core.errors import GroupSizeError
from saap.discovery.blocks import find_blocks
from saap.models.checkpoint.groupwise import linears_inside
from saap.models.loading.pretrained import load_tokenizer
from saap.models.loading.references import resolve_model
from saap.recovery.quantise import check_group_sizes

GROUP_SIZES = (16, 32, 64, 128)
PLAIN = "plain LoRA"
GRIDS = OWN_GRID, OFF_GRID, TRAINED_HERE = ("4 bits, 32", "none", "none, a small model trained here")
SMALL = Size(layers=4, width=256, inner=1024, steps=300)
"""A model with sizes that every group size divides."""
UNTRAINED = {"max_steps": 1, "learning_rate": 1e-12}
TASKS, QUESTIONS = ("arc_easy", "piqa"), 500
OPTIONS = {"tasks": "DIR"}
READS = ("cost.speed",)
SMOKE = False
SETTINGS = {
    "model": "{model}", "length": Scaled(64, 512), "tokens": Scaled(256, 16384), "evaluated tokens": Scaled(1024, 4096),
}  # fmt: skip
DECIDED_BY = (*MAKING, "benchmarks/experiments/cost/training_cost.py")


def cells(request: Request) -> Names:
    kinds = [*map(str, GROUP_SIZES), PLAIN]
    return [f"{grid} | {kind}" for grid in GRIDS for kind in kinds]


def measure(request: Request, wanted: Names) -> Measured:
    """Trainings on equal tokens without a teacher, each in a separate process."""
    for cell in wanted:
        grid, _, kind = cell.partition(" | ")
        model = weights_on(grid, request)
        refused = None if kind == PLAIN else refusal(model, int(kind))
        tasks = request.given.get("tasks") if grid == OFF_GRID else None
        yield cell, {"refused": refused} if refused else in_own_process(tuned, request.settings, model, kind, tasks)


def tuned(chosen: Values, model: str, kind: str, tasks: str | None) -> Values:
    how: dict[str, Any] = {"tuning": "lora"} if kind == PLAIN else {"group_size": int(kind)}
    steps, tokenizer = chosen["tokens"] // chosen["length"], load_tokenizer(resolve_model(model))

    def perplexity(model: torch.nn.Module) -> float:
        most = chosen["evaluated tokens"]
        report = saap.evaluate(model, texts=[TEXTS["wikitext2"]], tokenizer=tokenizer, max_tokens=most)
        return next(iter(report.perplexity.values())).value

    done, cost = train(model, chosen["length"], steps, **how)
    paths = linears_inside(done.model, find_blocks(done.model))
    linears: list[Any] = [done.model.get_submodule(path) for path in paths]
    found = {
        "peak_bytes": cost["peak_bytes"], "seconds_a_step": statistics.median(cost["step_seconds"]),
        "weight_bytes": done.report.packed_bytes or sum(linear.weight.nbytes for linear in linears),
        "perplexity": perplexity(done.model), "perplexity_quantised": None,
    }  # fmt: skip
    if kind != PLAIN:
        untrained, _ = train(model, chosen["length"], 1, **{**how, **UNTRAINED})
        found["perplexity_quantised"] = perplexity(untrained.model)
    if tasks is not None:
        asked: dict[str, Any] = {"tasks": TASKS, "task_data": tasks, "limit": QUESTIONS}
        answered = saap.evaluate(done.model, texts=[], tokenizer=tokenizer, **asked).tasks
        found["tasks"] = {name: {"acc": one.acc, "acc_stderr": one.acc_stderr} for name, one in answered.items()}
    return found


def weights_on(grid: str, request: Request) -> str:
    """The model with weights on `grid`: the packaged one, the same after a short plain LoRA tuning, or a new one."""
    if grid == OWN_GRID:
        return request.model
    if grid == TRAINED_HERE:
        folder = request.work / f"group-sizes-{request.size('quick', 'small')}"
        if not (folder / "config.json").is_file():
            train_into(folder, "llama", request.size(TRIAL, SMALL), short=request.quick)
        return str(folder)
    steps, length = request.size(4, 40), request.settings["length"]
    flags = f"--data mixed --tuning lora --max-steps {steps} --dtype float32 --max-seq-length {length}".split()
    name = f"off-grid-{steps}-{Path(request.model).name}"
    return str(made_by_saap(request, name, "recover", request.model, *flags))


def refusal(model: str, group_size: int) -> str | None:
    """Why groups of this size do not fit the matrices of the model; None if they do."""
    loaded = saap.load(model)
    try:
        check_group_sizes(linears_inside(loaded, find_blocks(loaded)), group_size)
    except GroupSizeError as error:
        return error.offender
    return None


def summarise(found: Cells) -> Values:
    of = {tuple(name.split(" | ")): cell for name, cell in found.items() if " | " in name}
    tuned = {key: cell for key, cell in of.items() if "refused" not in cell}
    rows = [{"source_grid": grid, "group_size": kind, **cell} for (grid, kind), cell in tuned.items()]
    off_grid = [row for row in rows if row["source_grid"] == OFF_GRID]
    grouped, plain = [row for row in off_grid if row["group_size"] != PLAIN], of[OFF_GRID, PLAIN]
    best = min(grouped, key=lambda row: float(row["perplexity"]))
    largest = max(grouped, key=lambda row: int(row["group_size"]))
    return {
        "rows": rows, "best": best, "largest": largest,
        "refused": {(cell["refused"], kind): None for (_, kind), cell in of.items() if "refused" in cell},
        "tasks": list(plain.get("tasks", {})),
        "zero_shot": {row["group_size"]: mean_accuracy(row) for row in off_grid if row.get("tasks")},
        "decode": speed.dense_decoding(found, ("f16", "q4_1")),
        "plain_perplexity": {grid: of[grid, PLAIN]["perplexity"] for grid in GRIDS},
        "best_over_plain": best["perplexity"] / plain["perplexity"],
        "largest_over_best": largest["perplexity"] / best["perplexity"],
        "bytes_saved": 1 - largest["weight_bytes"] / best["weight_bytes"],
    }  # fmt: skip


def mean_accuracy(row: Values) -> list[float]:
    tasks = row["tasks"].values()
    spread = math.sqrt(sum(task["acc_stderr"] ** 2 for task in tasks)) / len(tasks)
    return [sum(task["acc"] for task in tasks) / len(tasks), spread]


def figures(summary: Values) -> Figures:
    series = {}
    for grid in GRIDS:
        rows = [row for row in summary["rows"] if row["source_grid"] == grid and row["group_size"] != PLAIN]
        places, plain = [float(row["group_size"]) for row in rows], summary["plain_perplexity"][grid]
        for label, name in (("tuned", "perplexity"), ("only quantised", "perplexity_quantised")):
            series[f"{label}, grid: {grid}"] = (places, [row[name] / plain for row in rows])
    x, y = "inputs that share a scale and a zero point", "perplexity / plain LoRA"
    return [lines("group-sizes", series, x=x, y=y, log="x", ticks=True)]
