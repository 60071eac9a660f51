"""Zero-shot accuracy of our method and the baselines, with and without our reconstruction for all methods."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.digests import PRUNING, code_name
from harness.experiment import Cells, Measured, Names, Request, Values
from harness.store import read_json
from lab.commands import TEST, VALIDATION, compared, flags_from

from saap.core.evaluation_records import Comparison, TaskResult
from saap.evaluation.bootstrap import kept_share, usual_answers
from saap.reporting.comparison_tables import task_table
from saap.reporting.tables import to_markdown

METHODS = ("saap", "llm-pruner-element2@ffn", "flap", "wanda-sp@ffn")
RATIO = "0.2"
HEAD, DENSE = "settings", "dense"
ANSWERS = ("correct", "correct_norm")
OPTIONS = {"tasks": "DIR"}
NEEDS = ("tasks",)
SMOKE = False
SETTINGS = {
    "model": "{model}", "calibration": VALIDATION, "samples": 64, "sample length": 128, "refit tokens": 16384,
    "measured on": TEST, "measured tokens": 16384, "window": 512, "effort": "default", "seed": 0,
    "tasks": "arc_easy,piqa,boolq,openbookqa", "pruning ratio of the tasks": RATIO, "questions of a task": 500,
}  # fmt: skip
DECIDED_BY = (*PRUNING, "baselines", "pipeline/compare")


def cells(request: Request) -> Names:
    rows = (f"{m.replace('@', '_')}-{RATIO}-{state}-seed0" for m in METHODS for state in ("cut", "restored"))
    return [HEAD, DENSE, *rows]


def measure(request: Request, wanted: Names) -> Measured:
    """One `saap compare`; finished rows stay in its folder, which is of the present code alone."""
    folder = request.work.resolve() / f"zero-shot-{code_name(DECIDED_BY)}"
    tasks = Path(request.given["tasks"]).resolve()
    flags = [*flags_from(request.settings), "--task-data", tasks, "--rounded-tasks", "--pruning-ratio", RATIO]
    result = compared(request.model, {"both": METHODS}, *flags, out=folder)
    known = {HEAD: {name: result[name] for name in ("model", "settings", "versions")}, DENSE: packed(result["dense"])}
    for name in wanted:
        yield name, known[name] if name in known else packed(read_json(folder / "rows" / f"{name}.json"))


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


def comparison_of(found: Cells) -> Values:
    head = {name: found[HEAD][name] for name in ("model", "settings", "versions")}
    rows = [cell for name, cell in found.items() if name not in (HEAD, DENSE)]
    return {**head, "dense": found[DENSE], "rows": rows, "command": ["compare", head["model"]]}


def summarise(found: Cells) -> Values:
    whole = comparison_of({name: unpacked(cell) for name, cell in found.items()})
    table = task_table(Comparison.model_validate(whole), float(RATIO))
    against = differences(whole)
    return {
        "tasks": to_markdown(table), "differences": against, "count": len(against),
        "more": sum(one["low"] > 0 for one in against), "less": sum(one["high"] < 0 for one in against),
    }  # fmt: skip


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
