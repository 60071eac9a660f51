"""Zero-shot multiple-choice tasks, scored by lm-evaluation-harness, from the hub or from local files.

A local file contains the harness' prompts and choices for the rows on the hub. Both sources use the same harness code,
so the same rows give the same figures.
"""

from __future__ import annotations

import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from saap.core.errors import EvaluationError, first_line
from saap.core.evaluation_records import TaskResult
from saap.core.storage import faults_of
from saap.data.texts import read_rows
from saap.settings.evaluate import PAPER_TASKS

SPLITS = ("test", "validation")
BATCH = 8
_METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
_Options = Annotated[tuple[str, ...], Field(strict=False, min_length=2)]


class ChoiceRecord(BaseModel):
    """One line of a local task file: a prompt and its choices, or, for WinoGrande, contexts and one continuation."""

    model_config = ConfigDict(frozen=True, strict=True)

    query: str | None = None
    choices: _Options | None = None
    contexts: _Options | None = None
    continuation: str | None = None
    label: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _check(self) -> ChoiceRecord:
        plain = self.query is not None and self.choices is not None
        if plain == (self.contexts is not None and self.continuation is not None):
            raise ValueError("it needs `query` and `choices`, or `contexts` and `continuation`")
        last = len(self.choices or self.contexts or ()) - 1
        if self.label > last:
            raise ValueError(f"label {self.label} is not one of 0 to {last}")
        return self


def local_file(folder: Path, task: str) -> Path:
    """The task's file in `folder`, test preferred to validation. Raises EvaluationError with similar names."""
    for split in SPLITS:
        path = folder / f"{task}.{split}.jsonl"
        if path.is_file():
            return path
    there = sorted({file.name.split(".")[0] for split in SPLITS for file in folder.glob(f"*.{split}.jsonl")})
    if not there:
        raise EvaluationError(f"{folder} has no file named TASK.test.jsonl or TASK.validation.jsonl", "Give its folder")
    raise EvaluationError(f"{folder} has no file of the task {task!r}", f"{_near(task, there)}{', '.join(there)}")


def read_records(path: Path, limit: int | None = None) -> list[ChoiceRecord]:
    """The first `limit` records of a local task file; unknown fields of a line are ignored.

    Raises EvaluationError with file and line for a malformed record or one of another kind than the first, and
    CalibrationError for invalid JSON.
    """
    records: list[ChoiceRecord] = []
    for place, row in islice(read_rows(path), limit):
        try:
            record = ChoiceRecord.model_validate(row)
        except ValidationError as error:
            raise EvaluationError(
                f"{place} is not a record of a task ({faults_of(error)})", "Correct the line"
            ) from None
        if records and (record.choices is None) != (records[0].choices is None):
            raise EvaluationError(f"{place} is of another kind than the first", "Use one kind per file")
        records.append(record)
    if not records:
        raise EvaluationError(f"{path} has no records", "Give a file with one JSON object per line")
    return records


def check_tasks(names: Sequence[str], data: Path | None, limit: int | None = None, *, fetch: bool = True) -> None:
    """Raise EvaluationError early for anything that `evaluate_tasks` could not find, fetch or read.

    fetch: whether rows of the hub come into the local cache, from which `evaluate_tasks` reads them again; if not,
    only their tasks' names are checked.
    """
    known = sorted(_task_manager().all_subtasks)
    groups = {*_task_manager().all_groups, *_task_manager().all_tags}
    for name in names:
        if data is not None:
            read_records(local_file(data, name), limit)
        elif name in groups.difference(known):
            raise EvaluationError(f"{name} is a group of tasks", "Specify its tasks one by one")
        elif name not in known:
            raise EvaluationError(f"the task {name!r} is unknown", f"{_near(name, known)}{', '.join(PAPER_TASKS)}")
        elif fetch:
            _hub_task(name)


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TaskResult]:
    """Accuracy of `model` on zero-shot tasks, by name.

    names: of multiple-choice tasks. data: folder with files TASK.SPLIT.jsonl; None: the rows come from the hub. limit:
    only the first questions in file order. progress: called with the numbers of finished and all tasks. Raises
    EvaluationError before the first task is scored: if the harness is not installed, a task is unknown or of another
    kind, a record is malformed, or the rows cannot be downloaded.
    """
    _task_manager()  # raises if the harness is missing
    with _quiet():
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, backend="causal")
    paths = {name: None if data is None else local_file(data, name) for name in names}
    tasks = {
        name: _hub_task(name) if path is None else _local_task(name, read_records(path, limit))
        for name, path in paths.items()
    }
    results = {}
    for index, (name, path) in enumerate(paths.items()):
        results[name] = _result(tasks[name], wrapped, limit, "hub" if path is None else path.name)
        if progress is not None:
            progress(index + 1, len(paths))
    return results


def _near(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(near)}? It takes " if near else "Use some of "


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness, which prints and warns: stdout is for results."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(sink), redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@functools.cache
def _task_manager() -> Any:
    """The task manager of the harness, cached because import and indexing take seconds."""
    try:
        with _quiet():
            from lm_eval.tasks import TaskManager

            return TaskManager()
    except ImportError as error:
        raise EvaluationError(
            f"zero-shot tasks need lm-evaluation-harness, which is not installed ({error})",
            "Run `pip install 'saap[eval]'`",
        ) from error


def _hub_task(name: str) -> Any:
    """The harness' own task; acc_norm is added if the task lacks it and its choices are scored directly."""
    from lm_eval.api.task import ConfigurableTask

    try:
        with _quiet():
            (task,) = _task_manager().load([name])["tasks"].values()
            normalised = any(entry["metric"] == "acc_norm" for entry in task.config.metric_list)
            if task.OUTPUT_TYPE == "multiple_choice" and not (task.multiple_input or normalised):
                task = ConfigurableTask(config={**task.config.to_dict(keep_callable=True), "metric_list": _METRICS})
    except Exception as error:  # network, cache and format errors of several libraries with no common base
        raise EvaluationError(
            f"the rows of {name} cannot be fetched ({first_line(error)})",
            "Connect to the network, or give --task-data DIR",
        ) from error
    if task.OUTPUT_TYPE != "multiple_choice":
        raise EvaluationError(f"{name} is not a multiple-choice task", f"Use some of {', '.join(PAPER_TASKS)}")
    if callable(task.config.process_results):  # an answer of truthfulqa_mc2 is right to 0.3
        problem = f"{name} scores answers by a rule of its own, not as right or wrong"
        raise EvaluationError(problem, f"Use some of {', '.join(PAPER_TASKS)}")
    return task


def _local_task(name: str, records: Sequence[ChoiceRecord]) -> Any:
    """A task of the harness with `records` as rows."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    dataset = {"test": Dataset.from_list([record.model_dump() for record in records])}
    after_contexts = records[0].choices is None
    text, target, choice = ("label", "continuation", "contexts") if after_contexts else ("query", "label", "choices")
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: dataset,
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": lambda row: row[text],
        "doc_to_target": lambda row: row[target],
        "doc_to_choice": lambda row: row[choice],
        "metric_list": _METRICS[:1] if after_contexts else _METRICS,
    }
    with _quiet():
        return ConfigurableTask(config=config)


def _result(task: Any, model: Any, limit: int | None, source: str) -> TaskResult:
    """Score one task. source: origin of its rows."""
    from lm_eval import evaluator

    name = str(task.config.task)
    with _quiet(), torch.no_grad():
        found = evaluator.simple_evaluate(
            model=model, tasks=[task], num_fewshot=0, limit=limit, task_manager=_task_manager()
        )
    figures = found["results"][name]
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    measured: dict[str, Any] = {}
    for metric, answers in (("acc", "correct"), ("acc_norm", "correct_norm")):
        if f"{metric},none" in figures:
            error = figures[f"{metric}_stderr,none"]  # "N/A" for a single question
            measured |= {metric: float(figures[f"{metric},none"])}
            measured |= {f"{metric}_stderr": 0.0 if error == "N/A" else float(error)}
            measured[answers] = tuple(int(sample[metric]) for sample in samples)
    chance = sum(1 / len(task.doc_to_choice(sample["doc"])) for sample in samples) / len(samples)
    return TaskResult(**measured, chance=chance, questions=len(samples), source=source)
