"""Generated text and known facts of the dense, pruned and recovered model."""

from collections.abc import Mapping

import numpy as np
from harness.charts import bars
from harness.digests import MAKING
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.commands import made_by_saap, pruned_folder
from lab.dense import model_in
from lab.texts import DATA
from lab.training import FEW_STEPS

from saap.evaluation.generation import BUNDLED, Prompt, cloze, generation_figures, read_prompts, token_agreement, write
from saap.models.loading.devices import quick_float32_products
from saap.pipeline.shared.inputs import RunOptions, open_model

STATES = ("dense", "pruned", "recovered")
MODES = {"greedy": False, "sampled": True}
TASKS = ("arc_easy", "openbookqa")
"""Tasks whose questions with short answers are posed without the choices."""
CELLS = STATES
SETTINGS = {
    "model": "{model}", "prompts": BUNDLED, "tokens": Scaled(8, 128), "seed": 0,
    "open prompts": Scaled(1, 12), "minutes of recovery": 20,
    "sets of questions": [BUNDLED, *TASKS], "questions of a set": Scaled(4, 200),
}  # fmt: skip
DECIDED_BY = MAKING


def facts(limit: int) -> dict[str, list[Prompt]]:
    """Questions with an answer: the bundled ones and those of each task, at most `limit` per set."""
    sources = {BUNDLED: BUNDLED, **{task: str(DATA / "questions" / f"{task}.jsonl") for task in TASKS}}
    asked = {name: [one for one in read_prompts(file) if one.answer is not None] for name, file in sources.items()}
    return {name: questions[:limit] for name, questions in asked.items()}


def measure(request: Request, wanted: Names) -> Measured:
    chosen = request.settings
    dense = open_model(request.model, RunOptions(device="cpu"))
    length = chosen["tokens"]
    opens = [prompt.prompt for prompt in read_prompts(BUNDLED) if prompt.answer is None][: chosen["open prompts"]]
    questions = facts(chosen["questions of a set"])
    with quick_float32_products():
        by_dense = write(dense.model, dense.tokenizer, opens, tokens=length, sampled=False)
        for state in wanted:
            model = dense.model
            if state != "dense":
                folder = pruned_folder(request)
                if state == "recovered":
                    flags = request.size(FEW_STEPS, ["--max-minutes", chosen["minutes of recovery"]])
                    folder = made_by_saap(request, f"{folder.name}-recovered", "recover", folder, *flags)
                model = model_in(folder)
            texts = {m: write(model, dense.tokenizer, opens, tokens=length, sampled=s) for m, s in MODES.items()}
            known = {name: cloze(model, dense.tokenizer, asked) for name, asked in questions.items()}
            written = {mode: generation_figures(text, dense.model, dense.tokenizer) for mode, text in texts.items()}
            yield state, {
                "figures": {mode: one.model_dump(mode="json") for mode, one in written.items()},
                "prompt": opens[0], "example": next(written[0].text for written in texts.values() if written[0].text),
                "agreement": token_agreement(model, by_dense, dense.tokenizer),
                "facts": {
                    name: {"accuracy": one.accuracy, "answer_nll": one.answer_nll, "questions": one.prompts}
                    for name, one in known.items() if one is not None
                },
            }  # fmt: skip


def over_tasks(states: Cells, figure: str) -> Mapping[str, float]:
    """Mean of a figure over the tasks' questions, with equal weights, by state."""
    found = {state: [cell["facts"][task] for task in TASKS] for state, cell in states.items()}
    weights = {state: [one["questions"] for one in facts] for state, facts in found.items()}
    return {s: float(np.average([one[figure] for one in facts], weights=weights[s])) for s, facts in found.items()}


def summarise(cells: Cells) -> Values:
    states = {state: cells[state] for state in STATES}
    return {
        "states": states, "sets": {name: one["questions"] for name, one in states["dense"]["facts"].items()},
        "asked": over_tasks(states, "accuracy"), "answer_nll": over_tasks(states, "answer_nll"),
    }  # fmt: skip


def figures(summary: Values) -> Figures:
    names, states = list(summary["sets"]), summary["states"]
    values = {state: [cell["facts"][name]["accuracy"] for name in names] for state, cell in states.items()}
    return [bars("generation-facts", values, names, x="share of the questions")]
