"""What the models write and know: dense, pruned and recovered."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from resultsbook.charts import bars
from resultsbook.models import pruned_folder, recovered_folder
from resultsbook.row import Cells, Experiment, Request, Row, Values
from saap.evaluation.generation import (
    BUNDLED,
    Prompt,
    cloze,
    generation_figures,
    read_prompts,
    token_agreement,
    write,
)
from saap.models.devices import quick_float32_products
from saap.pipeline.inputs import LoadedModel, RunOptions, open_model
from saap.reporting.figures import Figure

STATES = ("dense", "pruned", "recovered")
MODES = ("greedy", "sampled")
TASKS = ("arc_easy.test.jsonl", "openbookqa.test.jsonl")
LONGEST_ANSWER = 3
"""Words: a longer answer can be put in many ways, so that one of them says little."""


def settings(request: Request) -> Values:
    asked = request.task_data is not None
    return {
        "model": request.model, "prompts": BUNDLED, "tokens": 8 if request.quick else 128, "seed": 0,
        "open prompts": 1 if request.quick else 12, "minutes of recovery": 20,
        "questions of a task": (4 if request.quick else 200) if asked else 0,
        "tasks": list(TASKS) if asked else [],
    }  # fmt: skip


def cells(request: Request) -> Sequence[str]:
    return STATES


def cloze_prompts(lines: Sequence[str], limit: int) -> list[Prompt]:
    """Questions of several choices as open ones: the first `limit` whose right choice has at most three words.

    lines: JSON objects with `query`, `choices` and `label`.
    """
    found: list[Prompt] = []
    for line in lines:
        row = json.loads(line)
        answer = row["choices"][row["label"]].strip().rstrip(".")
        if len(answer.split()) <= LONGEST_ANSWER and len(found) < limit:
            found.append(Prompt(prompt=row["query"], answer=answer))
    return found


def facts(folder: Path | None, limit: int) -> dict[str, list[Prompt]]:
    """The open questions of each task, from the folder's files."""
    if folder is None:
        return {}
    return {
        name.partition(".")[0]: cloze_prompts((folder / name).read_text(encoding="utf-8").splitlines(), limit)
        for name in TASKS
    }


def measure(request: Request, wanted: Sequence[str]) -> Iterator[tuple[str, Values]]:
    chosen = settings(request)
    dense = open_model(request.model, RunOptions(device="cpu"))
    prompts = read_prompts(BUNDLED)
    opens = [prompt.prompt for prompt in prompts if prompt.answer is None][: chosen["open prompts"]]
    known = [prompt for prompt in prompts if prompt.answer is not None][: 4 if request.quick else None]
    questions = {"bundled": known, **facts(request.task_data, chosen["questions of a task"])}
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
        figures[mode] = dataclasses.asdict(generation_figures(texts, dense.model, dense.tokenizer))
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


def summarise(cells: Cells) -> dict[str, Any]:
    states = {state: dict(cells[state]) for state in STATES}
    greedy = {state: cell["figures"]["greedy"] for state, cell in states.items()}
    return {
        "states": states,
        "repetition": {state: one["repetition"] for state, one in greedy.items()},
        "sampled_perplexity": {state: cell["figures"]["sampled"]["dense_perplexity"] for state, cell in states.items()},
        "known": {state: cell["facts"]["bundled"]["accuracy"] for state, cell in states.items()},
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


ROW = Row(
    name="generation",
    title="What is written and known",
    question="Does a pruned model still write coherently, without repeating itself, and what does it still know?",
    summarise=summarise,
    figures=figures,
    experiment=Experiment(cells=cells, settings=settings, measure=measure),
    limits="Coherence is judged by the dense model, not by people; a dozen prompts; an answer counts only in the one "
    "wording that the question names.",
)
