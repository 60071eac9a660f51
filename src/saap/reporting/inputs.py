"""What a report reads besides the folder of a model: reports of `saap eval` and comparisons, checked field by field.

The files may come from anybody: what is shown of them is of the right type, and small enough to be drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from saap.core.errors import EvaluationError
from saap.core.manifest import Seconds
from saap.core.storage import Amount, Count, faults_of

COMPARISON = "comparison.json"

_Positive = Annotated[Amount, Field(gt=0)]
_Share = Annotated[Amount, Field(ge=0, le=1)]


class _Value(BaseModel):
    value: _Positive | None


class _Task(BaseModel):
    acc: _Share
    acc_stderr: _Share
    chance: _Share


class _Interval(BaseModel):
    value: Amount | None
    low: Amount | None
    high: Amount | None


class _Facts(BaseModel):
    accuracy: _Share
    prompts: Count


class _Figures(BaseModel):
    distinct_1: Amount | None = None
    distinct_2: Amount | None = None
    distinct_3: Amount | None = None
    repetition: Amount | None = None
    tokens: Amount | None = None
    dense_perplexity: Amount | None = None


class _Generation(BaseModel):
    figures: dict[str, _Figures] | None = None
    dense_figures: dict[str, _Figures] | None = None
    token_agreement: _Share | None = None
    cloze: _Facts | None = None
    dense_cloze: _Facts | None = None
    samples: dict[str, dict[str, dict[str, str]]] = {}


class _ModelSpeed(BaseModel):
    model: str
    prefill: _Positive
    decode: _Positive
    bytes_per_token: Count


class _Speed(BaseModel):
    runtime: str
    weights: str
    threads: Count
    model: _ModelSpeed
    against: _ModelSpeed | None


class _Measured(BaseModel):
    model: str
    revision: str | None = None
    perplexity: dict[str, _Value]
    tasks: dict[str, _Task]


class _Evaluation(_Measured):
    dense: _Measured | None = None
    generation: _Generation | None = None
    speed: _Speed | None = None
    command: list[str] = []


class _Dense(BaseModel):
    parameters: Count
    perplexity: Annotated[dict[str, _Value], Field(min_length=1)]
    tasks: dict[str, _Task]
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
    perplexity: dict[str, _Value]
    ratios: dict[str, _Positive | None]
    tasks: dict[str, _Task]
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


def read_evaluation(path: Path) -> Mapping[str, Any]:
    """A report of `saap eval --out`. Raises EvaluationError."""
    return _read(_Evaluation, path, "report of `saap eval --out`", "Give the file that --out wrote")


def read_comparison(path: Path) -> Mapping[str, Any]:
    """The content of `comparison.json`. Raises EvaluationError, also where a row lacks a text or a task."""
    remedy = "Name a folder that `saap compare` wrote"
    comparison = _read(_Comparison, path, "comparison", remedy)
    texts, tasks = (list(comparison["dense"][kind]) for kind in ("perplexity", "tasks"))
    for number, row in enumerate(comparison["rows"]):
        has = (row["perplexity"].keys() & row["ratios"].keys(), row["tasks"].keys() or set(tasks))
        lacking = [
            name for names, found in zip((texts, tasks), has, strict=True) for name in names if name not in found
        ]
        if lacking:
            raise EvaluationError(f"{path} is no comparison (rows.{number} lacks {lacking[0]!r})", remedy)
    return comparison


def _read(kind: type[BaseModel], path: Path, what: str, remedy: str) -> dict[str, Any]:
    try:
        return kind.model_validate_json(path.read_bytes()).model_dump()
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read as a {what} ({error.strerror})", remedy) from None
    except ValidationError as error:
        raise EvaluationError(f"{path} is no {what} ({faults_of(error)})", remedy) from None
