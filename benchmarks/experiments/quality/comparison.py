"""Our method and the baselines on the real model, with and without our reconstruction for everybody."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.experiment import Cells, Experiment, Measured, Request, Values
from harness.store import ROOT, finished_cells, read_json, write_json
from lab.commands import TEST, VALIDATION

from saap.core.evaluation_records import Comparison, TaskResult
from saap.evaluation.bootstrap import kept_difference, usual_answers
from saap.reporting.comparison import comparison_table, ratio_table, task_table
from saap.reporting.tables import to_markdown

# LLM-Pruner and Wanda-sp are at their best on this model when they keep attention whole, so they are shown so, and
# with attention too.
MAIN = ("saap", "llm-pruner-element2@ffn", "llm-pruner-element1@ffn", "flap", "wanda-sp@ffn", "block-influence")
OTHERS = (
    "llm-pruner-vector@ffn", "llm-pruner-mixed@ffn", "llm-pruner-element2", "wanda-sp", "magnitude@ffn", "random@ffn",
)  # fmt: skip
TASK_METHODS = ("saap", "llm-pruner-element2@ffn", "flap", "wanda-sp@ffn")
TASKS = "arc_easy,piqa,boolq,openbookqa"
TASK_RATIO = "0.2"
QUESTIONS = 500
RATIOS = (("0.2", "0.3"), ("0.1", "0.5"))
"""Those of a command share the scores; the usual ones come first, so that a run that is stopped has them."""
PASSES = [(TASK_METHODS, (TASK_RATIO,), True)] + [(who, ratios, False) for who in (MAIN, OTHERS) for ratios in RATIOS]
"""Methods, ratios, and whether they answer the tasks: each a `saap compare` into the same folder."""
HEAD, DENSE = "settings", "dense"
ANSWERS = ("correct", "correct_norm")


def row_name(method: str, ratio: str, restored: bool) -> str:
    """The name of a row's file in the folder of a comparison."""
    return f"{method.replace('@', '_')}-{ratio}-{'restored' if restored else 'cut'}-seed0"


def names_of(methods: Sequence[str], ratios: Sequence[str]) -> list[str]:
    return [row_name(method, ratio, restored) for method in methods for ratio in ratios for restored in (False, True)]


def cells(request: Request) -> list[str]:
    asked = names_of(TASK_METHODS, [TASK_RATIO])
    every = {name for methods, ratios, _ in PASSES for name in names_of(methods, ratios)}
    return [HEAD, DENSE, *asked, *sorted(every - set(asked))]


def settings(request: Request) -> Values:
    return {
        "model": request.model, "calibration": VALIDATION, "samples": 64, "sample length": 128, "refit tokens": 16384,
        "measured on": TEST, "measured tokens": 16384, "window": 512, "effort": "default", "seed": 0,
        "tasks": TASKS, "pruning ratio of the tasks": TASK_RATIO, "questions of a task": QUESTIONS,
    }  # fmt: skip


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    """Every pass of which a row is missing; finished rows are in the folder before, so they are not made again."""
    folder = request.work.resolve() / "compare"
    if not (folder / "rows").is_dir():
        unpack(request, folder)
    for methods, ratios, with_tasks in PASSES:
        names = [name for name in names_of(methods, ratios) if name in wanted]
        if names:
            command = command_of(request, folder, methods, ratios, with_tasks=with_tasks)
            subprocess.run([sys.executable, "-m", "saap", *command], check=True, cwd=ROOT)
            for name in names:
                yield name, packed(read_json(folder / "rows" / f"{name}.json"))
    result = read_json(folder / "comparison.json")
    yield DENSE, packed(result["dense"])
    kept = {name: result[name] for name in ("model", "settings", "versions")}
    yield HEAD, {**kept, "digest": read_json(folder / "settings.json")["digest"]}


def command_of(
    request: Request, folder: Path, methods: Sequence[str], ratios: Sequence[str], *, with_tasks: bool
) -> list[str]:
    chosen = settings(request)
    return [
        "compare", request.model, "--out", str(folder), "--methods", ",".join(methods),
        "--pruning-ratios", ",".join(ratios), "--restore", "both", "--calibration", VALIDATION,
        "--samples", str(chosen["samples"]), "--sample-length", str(chosen["sample length"]),
        "--refit-tokens", str(chosen["refit tokens"]), "--effort", chosen["effort"],
        "--perplexity", TEST, "--window", str(chosen["window"]), "--max-tokens", str(chosen["measured tokens"]),
        "--tasks", TASKS, "--task-data", str(Path(request.given["tasks"]).resolve()), "--limit", str(QUESTIONS),
        "--rounded-tasks", "--task-ratios", TASK_RATIO if with_tasks else "none",
    ]  # fmt: skip


def packed(row: Values) -> dict[str, Any]:
    """A row whose answers are strings of 0 and 1, one for each question."""
    return _with_answers(row, lambda answers: "".join(map(str, answers)))


def unpacked(row: Values) -> dict[str, Any]:
    """The row that was packed."""
    return _with_answers(row, lambda answers: [int(answer) for answer in answers])


def _with_answers(row: Values, change: Any) -> dict[str, Any]:
    changed = copy.deepcopy(dict(row))
    for task in changed.get("tasks", {}).values():
        task |= {name: change(task[name]) for name in ANSWERS if task[name] is not None}
    return changed


def unpack(request: Request, folder: Path) -> None:
    """Write what has been measured as the folder of `saap compare`, which `saap report` reads and a new run resumes."""
    found = {name: unpacked(record["values"]) for name, record in finished_cells(EXPERIMENT, request).items()}
    for name, row in found.items():
        if name != HEAD:
            write_json(folder / "rows" / f"{name}.json", row)
    if HEAD in found:
        write_json(folder / "settings.json", {"digest": found[HEAD]["digest"]})
        write_json(folder / "comparison.json", comparison_of(found))


def comparison_of(found: Cells) -> dict[str, Any]:
    """The content of `comparison.json`, from unpacked cells."""
    head = found[HEAD]
    return {
        "model": head["model"], "dense": found[DENSE], "rows": rows_of(found), "command": ["compare", head["model"]],
        "settings": head["settings"], "versions": head["versions"],
    }  # fmt: skip


def rows_of(found: Cells) -> list[Values]:
    """The rows among cells, which may be those of several experiments."""
    return [cell for name, cell in found.items() if name.endswith("-seed0")]


def best_baseline(rows: Sequence[Values], *, restored: bool) -> dict[str, Any]:
    """The baseline with the least perplexity on WikiText-2 test among rows of one ratio."""
    theirs = {
        row["method"]: row["ratios"][TEST] for row in rows if row["method"] != "saap" and row["restored"] is restored
    }
    method = min(theirs, key=lambda method: theirs[method])
    return {"method": method, "ratio": theirs[method]}


def summarise(found: Cells) -> dict[str, Any]:
    whole = comparison_of({name: unpacked(cell) for name, cell in found.items()})
    tables = Comparison.model_validate(whole)
    ratios = sorted({row["ratio"] for row in whole["rows"]})
    # Our default reconstructs, so a user's first comparison is it against the baselines as they were published.
    sides = {"nobody": (False, False), "all": (True, True), "ours": (True, False)}
    against = {who: [quotient(whole, ratio, *both) for ratio in ratios] for who, both in sides.items()}
    return {
        "cut": to_markdown(ratio_table(tables, TEST, False)),
        "restored": to_markdown(ratio_table(tables, TEST, True)),
        "against": against,
        "tasks": to_markdown(task_table(tables, float(TASK_RATIO))),
        "differences": differences(whole),
        "all": to_markdown(comparison_table(tables)),
    }


def quotient(whole: Values, ratio: float, ours_restored: bool, theirs_restored: bool) -> dict[str, Any]:
    """Our perplexity ratio over that of the best baseline at one pruning ratio."""
    rows = [row for row in whole["rows"] if row["ratio"] == ratio]
    ours = next(r["ratios"][TEST] for r in rows if r["method"] == "saap" and r["restored"] is ours_restored)
    best = best_baseline(rows, restored=theirs_restored)
    return {"removed": ratio, "ours": ours, "best": best, "quotient": ours / best["ratio"]}


def differences(whole: Values) -> list[dict[str, Any]]:
    """How much more of the accuracy above chance saap keeps than each baseline, from paired draws of the questions."""
    dense = _results(whole["dense"]["tasks"])
    chance = [result.chance for result in dense.values()]
    answers = {
        (row["method"], row["restored"]): _answers(_results(row["tasks"])) for row in whole["rows"] if row["tasks"]
    }
    found = []
    for (method, restored), theirs in answers.items():
        if method != "saap":
            kept = kept_difference(_answers(dense), answers["saap", restored], theirs, chance)
            found.append(
                {"method": method, "restored": restored, "value": kept.value, "low": kept.low, "high": kept.high}
            )
    return found


def _results(tasks: Mapping[str, Any]) -> dict[str, TaskResult]:
    return {name: TaskResult(**values) for name, values in tasks.items()}


def _answers(results: Mapping[str, TaskResult]) -> list[tuple[int, ...]]:
    return [usual_answers(name, result) for name, result in results.items()]


EXPERIMENT = Experiment(
    name="comparison", cells=cells, settings=settings, measure=measure, summarise=summarise,
    options={"tasks": "DIR"}, needs=("tasks",), smoke=False,
)  # fmt: skip
