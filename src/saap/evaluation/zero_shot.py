"""Zero-shot multiple-choice tasks, scored by lm-evaluation-harness, from the hub or from local files.

A local file holds what the harness makes of the hub's rows: the prompt and the choices. Both ways go through the same
harness code, so the same rows give the same figures.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from saap.core.errors import EvaluationError, first_line
from saap.settings.measure import PAPER_TASKS

SPLITS = ("test", "validation")
BATCH = 8
_METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """Accuracies of one task, and their standard errors over the questions.

    acc: the choice with the greatest log-likelihood is the right one. acc_norm: log-likelihoods divided by the
    choice's characters; None where the choices differ before the text that is scored (WinoGrande). chance: accuracy of
    guessing. correct, correct_norm: by question, in file order. source: `hub`, or the local file's name.
    """

    acc: float
    acc_stderr: float
    acc_norm: float | None
    acc_norm_stderr: float | None
    chance: float
    questions: int
    source: str
    correct: tuple[int, ...]
    correct_norm: tuple[int, ...] | None


class ChoiceRecord(BaseModel):
    """One line of a local task file: a prompt and its choices, or, for WinoGrande, contexts and one continuation."""

    model_config = ConfigDict(frozen=True, strict=True)

    query: str | None = None
    choices: tuple[str, ...] | None = Field(default=None, strict=False)
    contexts: tuple[str, ...] | None = Field(default=None, strict=False)
    continuation: str | None = None
    label: int

    @model_validator(mode="after")
    def _check(self) -> ChoiceRecord:
        plain = self.query is not None and self.choices is not None
        turned = self.contexts is not None and self.continuation is not None
        if plain == turned:
            raise ValueError("it needs `query` and `choices`, or `contexts` and `continuation`")
        if len(self.options) < 2:
            raise ValueError("it needs at least two choices")
        if not 0 <= self.label < len(self.options):
            raise ValueError(f"label {self.label} is not one of 0 to {len(self.options) - 1}")
        return self

    @property
    def options(self) -> tuple[str, ...]:
        """The choices, or the contexts."""
        return self.choices or self.contexts or ()


def local_file(folder: Path, task: str) -> Path:
    """The task's file in `folder`, test preferred to validation. Raises EvaluationError that offers near names."""
    for split in SPLITS:
        path = folder / f"{task}.{split}.jsonl"
        if path.is_file():
            return path
    there = sorted({file.name.split(".")[0] for split in SPLITS for file in folder.glob(f"*.{split}.jsonl")})
    if not there:
        raise EvaluationError(f"{folder} has no file named TASK.test.jsonl or TASK.validation.jsonl", "Name its folder")
    raise EvaluationError(f"{folder} has no file of the task {task!r}", f"{_near(task, there)}{', '.join(there)}")


def read_records(path: Path, limit: int | None = None) -> list[ChoiceRecord]:
    """The first `limit` records of a local task file; other fields of a line are not read.

    Raises EvaluationError, naming file and line, for a malformed record or one of another kind than the first.
    """
    records: list[ChoiceRecord] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read ({error})", "Give a readable UTF-8 file") from error
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(records) >= limit:
            break
        if not line.strip():
            continue
        try:
            record = ChoiceRecord.model_validate(json.loads(line))
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{path}, line {number}, is not JSON ({error.msg})", "Mend the line") from None
        except ValidationError as error:
            first = error.errors()[0]
            what = ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
            raise EvaluationError(f"{path}, line {number}, is no record of a task ({what})", "Mend the line") from None
        if records and (record.choices is None) != (records[0].choices is None):
            raise EvaluationError(f"{path}, line {number}, is of another kind than the first", "Use one kind a file")
        records.append(record)
    if not records:
        raise EvaluationError(f"{path} has no records", "Give a file with one JSON object a line")
    return records


def check_tasks(names: Sequence[str], data: Path | None, limit: int | None = None) -> None:
    """Raise EvaluationError now for anything that `evaluate_tasks` could not find or read later."""
    if limit is not None and limit < 1:
        raise EvaluationError(f"--limit {limit} leaves no question", "Give at least 1")
    harness = _harness()
    if data is not None:
        for name in names:
            read_records(local_file(data, name), limit)
        return
    known = harness.task_names()
    for name in names:
        if name not in known:
            hint = _near(name, sorted(known))
            raise EvaluationError(f"the task {name!r} is unknown", f"{hint}{', '.join(PAPER_TASKS)}")


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    *,
    data: Path | None = None,
    limit: int | None = None,
    batch: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TaskResult]:
    """Accuracy of `model` on zero-shot tasks, by name.

    names: of multiple-choice tasks. data: folder with files TASK.SPLIT.jsonl; None: the rows come from the hub. limit:
    only the first questions in file order. batch: sequences per forward pass. progress: called with the numbers of
    tasks done and of all.
    Raises EvaluationError if the harness is not installed, a task is unknown, a record malformed, or the rows cannot
    be fetched.
    """
    harness = _harness()
    results = {}
    for index, name in enumerate(names):
        path = None if data is None else local_file(data, name)
        task = harness.hub_task(name) if path is None else harness.local_task(name, read_records(path, limit))
        results[name] = harness.run(task, model, tokenizer, limit, batch, "hub" if path is None else path.name)
        if progress is not None:
            progress(index + 1, len(names))
    return results


def mean_accuracy(results: Mapping[str, TaskResult]) -> dict[str, float]:
    """Plain means over the tasks of acc, and of acc_norm where a task has it and acc elsewhere."""
    count = max(1, len(results))
    return {
        "acc": sum(result.acc for result in results.values()) / count,
        "acc_norm": sum(result.acc if result.acc_norm is None else result.acc_norm for result in results.values())
        / count,
    }


def _near(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(near)}? It takes " if near else "Use some of "


def _measures(task: Any, metric: str) -> bool:
    return any(entry["metric"] == metric for entry in task.config.metric_list)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness prints and warns on its own; stdout belongs to the answer."""
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
def _harness() -> _Harness:
    """The harness, imported and its tasks indexed once: both take seconds."""
    try:
        with _quiet():
            import datasets
            from lm_eval import evaluator
            from lm_eval.api.task import ConfigurableTask
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager

            manager = TaskManager()
    except ImportError as error:
        raise EvaluationError(
            f"zero-shot tasks need lm-evaluation-harness, which is not installed ({error})",
            "Run `pip install 'saap[eval]'`",
        ) from error
    return _Harness(evaluator, ConfigurableTask, HFLM, manager, datasets)


@dataclass(frozen=True, slots=True)
class _Harness:
    """The parts of the harness that are used."""

    evaluator: Any
    task_class: Any
    model_class: Any
    manager: Any
    datasets: Any

    def task_names(self) -> set[str]:
        return set(self.manager.all_tasks)

    def hub_task(self, name: str) -> Any:
        """The harness' own task; acc_norm is added where it leaves it out and its choices are what is scored."""
        try:
            with _quiet():
                (task,) = self.manager.load([name])["tasks"].values()
                if task.OUTPUT_TYPE == "multiple_choice" and not (task.multiple_input or _measures(task, "acc_norm")):
                    task = self.task_class(config={**task.config.to_dict(keep_callable=True), "metric_list": _METRICS})
        except Exception as error:  # network, cache and format errors of several libraries with no common base
            reason = first_line(error)
            raise EvaluationError(
                f"the rows of {name} cannot be fetched ({reason})", "Connect to the network, or give --task-data DIR"
            ) from error
        return task

    def local_task(self, name: str, records: Sequence[ChoiceRecord]) -> Any:
        """A task of the harness whose rows are `records`."""
        turned = records[0].choices is None
        rows = [record.model_dump() for record in records]
        dataset = {"test": self.datasets.Dataset.from_list(rows)}
        config: dict[str, Any] = {
            "task": name,
            "custom_dataset": lambda **_: dataset,
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": (lambda row: row["label"]) if turned else (lambda row: row["query"]),
            "doc_to_target": (lambda row: row["continuation"]) if turned else (lambda row: row["label"]),
            "doc_to_choice": (lambda row: row["contexts"]) if turned else (lambda row: row["choices"]),
            "metric_list": _METRICS[:1] if turned else _METRICS,
        }
        with _quiet():
            return self.task_class(config=config)

    def run(
        self, task: Any, model: nn.Module, tokenizer: Any, limit: int | None, batch: int, source: str
    ) -> TaskResult:
        """Score one task. source: where its rows came from."""
        name = str(task.config.task)
        if task.OUTPUT_TYPE != "multiple_choice":
            raise EvaluationError(f"{name} is no multiple-choice task", f"Use some of {', '.join(PAPER_TASKS)}")
        with _quiet(), torch.no_grad():
            wrapped = self.model_class(pretrained=model, tokenizer=tokenizer, batch_size=batch, backend="causal")
            found = self.evaluator.simple_evaluate(
                model=wrapped, tasks=[task], num_fewshot=0, limit=limit, task_manager=self.manager
            )
        figures = found["results"][name]
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        norm = figures.get("acc_norm,none")
        return TaskResult(
            acc=float(figures["acc,none"]),
            acc_stderr=float(figures["acc_stderr,none"]),
            acc_norm=None if norm is None else float(norm),
            acc_norm_stderr=None if norm is None else float(figures["acc_norm_stderr,none"]),
            chance=sum(1 / len(task.doc_to_choice(sample["doc"])) for sample in samples) / len(samples),
            questions=len(samples),
            source=source,
            correct=tuple(int(sample["acc"]) for sample in samples),
            correct_norm=None if norm is None else tuple(int(sample["acc_norm"]) for sample in samples),
        )
