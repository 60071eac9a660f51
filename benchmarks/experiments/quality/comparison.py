"""Our method and the baselines on the real model, with and without our reconstruction for all methods."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.digests import PRUNING
from harness.experiment import Cells, Measured, Names, Request, Values, experiment
from harness.store import finished_cells, read_json, write_json
from lab.commands import TEST, VALIDATION, flags_from, in_own_process, run_here

from saap.core.evaluation_records import Comparison, TaskResult
from saap.evaluation.bootstrap import kept_share, usual_answers
from saap.reporting.comparison_tables import comparison_table, ratio_table, task_table
from saap.reporting.tables import to_markdown

# LLM-Pruner and Wanda-sp are best on this model without pruning attention, so they are shown with and without it.
MAIN = ("saap", "llm-pruner-element2@ffn", "llm-pruner-element1@ffn", "flap", "wanda-sp@ffn", "block-influence")
OTHERS = (
    "llm-pruner-vector@ffn", "llm-pruner-mixed@ffn", "llm-pruner-element2", "wanda-sp", "magnitude@ffn", "random@ffn",
)  # fmt: skip
TASK_METHODS = ("saap", "llm-pruner-element2@ffn", "flap", "wanda-sp@ffn")
TASK_RATIO = "0.2"
RATIOS = (("0.2", "0.3"), ("0.1", "0.5"))
"""Ratios by command, which share the scores; usual ratios come first, so that an interrupted run has them."""
PASSES = [(TASK_METHODS, (TASK_RATIO,), TASK_RATIO), *((w, r, "none") for w in (MAIN, OTHERS) for r in RATIOS)]
"""Methods, ratios, and ratio of the tasks: each a `saap compare` into the same folder."""
HEAD, DENSE = "settings", "dense"
ANSWERS = ("correct", "correct_norm")
OPTIONS = {"tasks": "DIR"}
NEEDS = ("tasks",)
SMOKE = False
SETTINGS = {
    "model": "{model}", "calibration": VALIDATION, "samples": 64, "sample length": 128, "refit tokens": 16384,
    "measured on": TEST, "measured tokens": 16384, "window": 512, "effort": "default", "seed": 0,
    "tasks": "arc_easy,piqa,boolq,openbookqa", "pruning ratio of the tasks": TASK_RATIO, "questions of a task": 500,
}  # fmt: skip
DECIDED_BY = (*PRUNING, "baselines", "pipeline/compare")


def names_of(methods: Names, ratios: Names) -> list[str]:
    states = ("cut", "restored")
    return [f"{m.replace('@', '_')}-{ratio}-{state}-seed0" for m in methods for ratio in ratios for state in states]


def cells(request: Request) -> Names:
    first = names_of(TASK_METHODS, [TASK_RATIO])
    every = {name for methods, ratios, _ in PASSES for name in names_of(methods, ratios)}
    return [HEAD, DENSE, *first, *sorted(every - set(first))]


def measure(request: Request, wanted: Names) -> Measured:
    """Run every pass with a missing row; finished rows are written to the folder first, so they are kept."""
    folder = request.work.resolve() / "compare"
    if not (folder / "rows").is_dir():
        unpack(request, folder)
    flags = flags_from(request.settings)
    flags += ["--task-data", str(Path(request.given["tasks"]).resolve()), "--restore", "both", "--rounded-tasks"]
    for methods, ratios, task_ratio in PASSES:
        names = [name for name in names_of(methods, ratios) if name in wanted]
        if names:
            own = ["--methods", ",".join(methods), "--pruning-ratio", ",".join(ratios), "--task-ratios", task_ratio]
            in_own_process(run_here, ["compare", request.model, "--out", str(folder), *own, *flags])
            for name in names:
                yield name, packed(read_json(folder / "rows" / f"{name}.json"))
    result = read_json(folder / "comparison.json")
    yield DENSE, packed(result["dense"])
    kept = {name: result[name] for name in ("model", "settings", "versions")}
    yield HEAD, {**kept, "digest": read_json(folder / "settings.json")["digest"]}


def packed(row: Values, change: Callable[[Any], Any] = lambda answers: "".join(map(str, answers))) -> Values:
    """A row with its answers as strings of 0 and 1, one character per question."""
    if "tasks" not in row:
        return row
    changed = {
        name: {**task, **{kind: change(task[kind]) for kind in ANSWERS if task[kind] is not None}}
        for name, task in row["tasks"].items()
    }
    return {**row, "tasks": changed}


def unpacked(row: Values) -> Values:
    return packed(row, lambda answers: [int(answer) for answer in answers])


def unpack(request: Request, folder: Path) -> None:
    """Write the measured cells as a folder of `saap compare`, for `saap report` and for resuming."""
    records = finished_cells(experiment("quality.comparison"), request)
    found = {name: unpacked(record["values"]) for name, record in records.items()}
    for name, row in found.items():
        if name != HEAD:
            write_json(folder / "rows" / f"{name}.json", row)
    if HEAD in found:
        write_json(folder / "settings.json", {"digest": found[HEAD]["digest"]})
        write_json(folder / "comparison.json", comparison_of(found))


def comparison_of(found: Cells) -> Values:
    head = {name: found[HEAD][name] for name in ("model", "settings", "versions")}
    return {**head, "dense": found[DENSE], "rows": rows_of(found), "command": ["compare", head["model"]]}


def rows_of(found: Cells) -> list[Values]:
    """The rows in cells of one or several experiments."""
    return [cell for name, cell in found.items() if name.endswith("-seed0")]


def best_baseline(rows: Sequence[Values], *, restored: bool) -> dict[str, Any]:
    """The baseline with the lowest perplexity on WikiText-2 test among rows of one ratio."""
    theirs = [row for row in rows if row["method"] != "saap" and row["restored"] is restored]
    best = min(theirs, key=lambda row: float(row["ratios"][TEST]))
    return {"method": best["method"], "ratio": best["ratios"][TEST]}


def summarise(found: Cells) -> Values:
    whole = comparison_of({name: unpacked(cell) for name, cell in found.items()})
    tables = Comparison.model_validate(whole)
    ratios = sorted({row["ratio"] for row in whole["rows"]})
    # Our default reconstructs, so the main comparison is with the baselines as published.
    sides = {"nobody": (False, False), "all": (True, True), "ours": (True, False)}
    return {
        "cut": to_markdown(ratio_table(tables, TEST, False)), "restored": to_markdown(ratio_table(tables, TEST, True)),
        "against": {who: [quotient(whole, ratio, *both) for ratio in ratios] for who, both in sides.items()},
        "tasks": to_markdown(task_table(tables, float(TASK_RATIO))),
        "differences": differences(whole), "all": to_markdown(comparison_table(tables)),
    }  # fmt: skip


def quotient(whole: Values, ratio: float, ours_restored: bool, theirs_restored: bool) -> Values:
    rows = [row for row in whole["rows"] if row["ratio"] == ratio]
    ours = next(r["ratios"][TEST] for r in rows if r["method"] == "saap" and r["restored"] is ours_restored)
    best = best_baseline(rows, restored=theirs_restored)
    return {"removed": ratio, "ours": ours, "best": best, "quotient": ours / best["ratio"]}


def differences(whole: Values) -> list[Values]:
    """Difference in kept accuracy above chance of saap and each baseline, from paired draws of the questions."""

    def answers_of(tasks: Mapping[str, Any]) -> list[tuple[int, ...]]:
        return [usual_answers(name, TaskResult(**values)) for name, values in tasks.items()]

    tasks = whole["dense"]["tasks"]
    dense, chance = answers_of(tasks), [values["chance"] for values in tasks.values()]
    answers = {(row["method"], row["restored"]): answers_of(row["tasks"]) for row in whole["rows"] if row["tasks"]}
    found: list[Values] = []
    for (method, restored), theirs in answers.items():
        if method != "saap":
            kept = kept_share(dense, answers["saap", restored], chance, than=theirs)
            found.append({"method": method, "restored": restored, **kept.model_dump()})
    return found
