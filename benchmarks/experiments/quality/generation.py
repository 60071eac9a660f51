"""What the models write and know: dense, pruned and recovered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from harness.charts import bars
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import pruned_folder, recovered_folder
from lab.texts import DATA

from saap.evaluation.generation import (
    BUNDLED,
    Prompt,
    cloze,
    generation_figures,
    read_prompts,
    token_agreement,
    write,
)
from saap.models.loading.devices import quick_float32_products
from saap.pipeline.shared.inputs import LoadedModel, RunOptions, open_model
from saap.reporting.figures import Figure

STATES = ("dense", "pruned", "recovered")
MODES = ("greedy", "sampled")
TASKS = ("arc_easy", "openbookqa")
"""Their questions whose answer is short, asked without the choices."""


def settings(request: Request) -> Values:
    return {
        "model": request.model, "prompts": BUNDLED, "tokens": 8 if request.quick else 128, "seed": 0,
        "open prompts": 1 if request.quick else 12, "minutes of recovery": 20,
        "sets of questions": [BUNDLED, *TASKS], "questions of a set": 4 if request.quick else 200,
    }  # fmt: skip


def cells(request: Request) -> Sequence[str]:
    return STATES


def facts(limit: int) -> dict[str, list[Prompt]]:
    """Questions with an answer: the bundled ones and those of each task, at most `limit` of a set."""
    sources = {BUNDLED: BUNDLED, **{task: str(DATA / "questions" / f"{task}.jsonl") for task in TASKS}}
    return {
        name: [prompt for prompt in read_prompts(source) if prompt.answer is not None][:limit]
        for name, source in sources.items()
    }


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    chosen = settings(request)
    dense = open_model(request.model, RunOptions(device="cpu"))
    prompts = read_prompts(BUNDLED)
    opens = [prompt.prompt for prompt in prompts if prompt.answer is None][: chosen["open prompts"]]
    questions = facts(chosen["questions of a set"])
    with quick_float32_products():
        by_dense = write(dense.model, dense.tokenizer, opens, tokens=chosen["tokens"], sampled=False)
        for state in wanted:
            loaded = dense if state == "dense" else open_model(_folder(request, state), RunOptions(device="cpu"))
            agreed = token_agreement(loaded.model, by_dense, dense.tokenizer)
            yield state, {**_written(loaded, dense, opens, chosen["tokens"]), "agreement": agreed,
                          "facts": _known(loaded, dense, questions)}  # fmt: skip


def _folder(request: Request, state: str) -> str:
    minutes = settings(request)["minutes of recovery"]
    return str(pruned_folder(request) if state == "pruned" else recovered_folder(request, minutes))


def _written(loaded: LoadedModel, dense: LoadedModel, opens: Sequence[str], tokens: int) -> dict[str, Any]:
    """Measures of what a model writes, by mode, and the first answer as it stands."""
    figures, example = {}, ""
    for mode in MODES:
        texts = write(loaded.model, dense.tokenizer, opens, tokens=tokens, sampled=mode == "sampled")
        figures[mode] = generation_figures(texts, dense.model, dense.tokenizer).model_dump(mode="json")
        example = example or texts[0].text
    return {"figures": figures, "prompt": opens[0], "example": example}


def _known(loaded: LoadedModel, dense: LoadedModel, questions: Mapping[str, Sequence[Prompt]]) -> dict[str, Any]:
    found = {}
    for name, asked in questions.items():
        figures = cloze(loaded.model, dense.tokenizer, asked)
        if figures is not None:
            found[name] = {
                "accuracy": figures.accuracy, "answer_nll": figures.answer_nll, "questions": figures.prompts,
            }  # fmt: skip
    return found


def _over_tasks(cell: Values, figure: str) -> float:
    """Mean of a figure of the tasks' questions, every question alike."""
    found = [cell["facts"][task] for task in TASKS]
    return float(np.average([one[figure] for one in found], weights=[one["questions"] for one in found]))


def summarise(cells: Cells) -> dict[str, Any]:
    states = {state: dict(cells[state]) for state in STATES}
    greedy = {state: cell["figures"]["greedy"] for state, cell in states.items()}
    return {
        "states": states,
        "repetition": {state: one["repetition"] for state, one in greedy.items()},
        "sampled_perplexity": {state: cell["figures"]["sampled"]["dense_perplexity"] for state, cell in states.items()},
        "known": {state: cell["facts"][BUNDLED]["accuracy"] for state, cell in states.items()},
        "asked": {state: _over_tasks(cell, "accuracy") for state, cell in states.items()},
        "answer_nll": {state: _over_tasks(cell, "answer_nll") for state, cell in states.items()},
        "sets": {name: one["questions"] for name, one in states["dense"]["facts"].items()},
        "seeds": [0],
    }


def figures(summary: Values) -> Sequence[Figure]:
    names = list(summary["sets"])
    values = {state: [cell["facts"][name]["accuracy"] for name in names] for state, cell in summary["states"].items()}
    figure = bars(
        "generation-facts", "Facts that are continued rightly",
        "Share of the open questions that the dense, the pruned and the recovered model continue with the answer.",
        values, names, x="share of the questions",
    )  # fmt: skip
    return (figure,)


EXPERIMENT = Experiment(
    name="generation", cells=cells, settings=settings, measure=measure, summarise=summarise, figures=figures
)
