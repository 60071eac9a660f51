"""What a report reads, checked field by field: reports of `saap eval`, comparisons, and the groups of a plan.

The files may come from anybody: what is shown of them is of the right type, and small enough to be drawn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from saap.core.errors import EvaluationError, PlanError
from saap.core.manifest import Seconds
from saap.core.records import Role
from saap.core.storage import Amount, Count, PlanDocument, faults_of

COMPARISON = "comparison.json"
_PLACE = re.compile(rf"(layers\.(?P<layer>[0-9]{{1,6}})\.)?(?P<role>{'|'.join(Role)})(\.|$)", re.ASCII)
_Positive = Annotated[Amount, Field(gt=0)]
_Share = Annotated[Amount, Field(ge=0, le=1)]


class TextPerplexity(BaseModel):
    """Perplexity on one text, None where it is not finite."""

    value: _Positive | None


class TaskAccuracy(BaseModel):
    """Accuracy on one task, its standard error, and that of guessing."""

    acc: _Share
    acc_stderr: _Share
    chance: _Share


class _Interval(BaseModel):
    value: Amount | None
    low: Amount | None
    high: Amount | None


class Facts(BaseModel):
    """Share of the prompts with one right continuation that got it."""

    accuracy: _Share
    prompts: Count


class WritingMeasures(BaseModel):
    """Measures of what a model wrote in one mode."""

    distinct_1: Amount | None = None
    distinct_2: Amount | None = None
    distinct_3: Amount | None = None
    repetition: Amount | None = None
    tokens: Amount | None = None
    dense_perplexity: Amount | None = None


class Generation(BaseModel):
    """What the models wrote. samples: mode -> prompt -> model -> text."""

    figures: dict[str, WritingMeasures] | None = None
    dense_figures: dict[str, WritingMeasures] | None = None
    token_agreement: _Share | None = None
    cloze: Facts | None = None
    dense_cloze: Facts | None = None
    samples: dict[str, dict[str, dict[str, str]]] = {}


class ModelSpeed(BaseModel):
    """Tokens per second of one model."""

    model: str
    prefill: _Positive
    decode: _Positive
    bytes_per_token: Count


class Speed(BaseModel):
    """Speeds that were measured in turns."""

    runtime: str
    weights: str
    threads: Count
    model: ModelSpeed
    against: ModelSpeed | None


class Measured(BaseModel):
    """What was measured of one model."""

    model: str
    revision: str | None = None
    perplexity: dict[str, TextPerplexity]
    tasks: dict[str, TaskAccuracy]


class Evaluation(Measured):
    """A report of `saap eval --out`."""

    dense: Measured | None = None
    generation: Generation | None = None
    speed: Speed | None = None
    command: list[str] = []


class _Dense(BaseModel):
    parameters: Count
    perplexity: Annotated[dict[str, TextPerplexity], Field(min_length=1)]
    tasks: dict[str, TaskAccuracy]
    tokens_per_second: _Positive | None


class _Stages(BaseModel):
    score: Seconds
    search: Seconds
    make: Seconds


class _Row(BaseModel):
    method: str
    ratio: _Share
    seed: Count
    restored: bool
    pruning_ratio: Amount
    parameters: Count
    perplexity: dict[str, TextPerplexity]
    ratios: dict[str, _Positive | None]
    tasks: dict[str, TaskAccuracy]
    kept_accuracy: _Interval | None
    seconds: _Stages
    tokens_per_second: _Positive | None
    peak_resident_bytes: Count


class _Comparison(BaseModel):
    model: str
    dense: _Dense
    rows: Annotated[list[_Row], Field(min_length=1)]
    settings: dict[str, Any]
    versions: dict[str, str]
    command: list[str] = []


def read_evaluation(path: Path) -> Evaluation:
    """A report of `saap eval --out`. Raises EvaluationError."""
    return _read(Evaluation, path, "report of `saap eval --out`", "Give the file that --out wrote")


def read_comparison(path: Path) -> Mapping[str, Any]:
    """The content of `comparison.json`. Raises EvaluationError, also where a row lacks a text or a task."""
    remedy = "Name a folder that `saap compare` wrote"
    comparison = _read(_Comparison, path, "comparison", remedy)
    dense = comparison.dense
    for number, row in enumerate(comparison.rows):
        lacking = [text for text in dense.perplexity if text not in row.perplexity.keys() & row.ratios.keys()]
        lacking += [task for task in dense.tasks if row.tasks and task not in row.tasks]
        if lacking:
            raise EvaluationError(f"{path} is no comparison (rows.{number} lacks {lacking[0]!r})", remedy)
    return comparison.model_dump()


_Kind = TypeVar("_Kind", bound=BaseModel)


def _read(kind: type[_Kind], path: Path, what: str, remedy: str) -> _Kind:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read as a {what} ({error.strerror})", remedy) from None
    except ValidationError as error:
        raise EvaluationError(f"{path} is no {what} ({faults_of(error)})", remedy) from None


@dataclass(frozen=True, slots=True)
class PlanGroup:
    """A group of a plan that can be shown. layer: -1 for the whole model's. units: the kept ones, as runs."""

    layer: int
    role: str
    kept: int
    of: int
    units: str | None


def plan_groups(plan: PlanDocument, file: Path) -> dict[str, PlanGroup]:
    """The groups by name, "layers.3.ffn" or "hidden". Raises PlanError for what is no group of a written plan."""
    found = {}
    for name, entry in plan.groups.items():
        place = _PLACE.match(name)
        if place is None or entry.kept is None or entry.of is None or entry.kept > entry.of:
            raise PlanError(
                f"{file} has a group {name[:60]!r} that no run has written", "Use the folder as `saap prune` wrote it"
            )
        found[name] = PlanGroup(int(place["layer"] or -1), place["role"], entry.kept, entry.of, entry.units)
    return found
