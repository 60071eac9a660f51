"""The record of a run that lies in its result: what was done to which model, with what, and what came out."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from saap.records import Layout, ModelRef

RECORDED_PACKAGES = ("saap", "torch", "transformers", "safetensors", "numpy", "tokenizers", "gguf", "llama-cpp-py-sync")


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModelIdentity(_Frozen):
    """The dense model. licence: as its own card states it, None if unknown."""

    source: str
    revision: str | None = None
    config_digest: str
    weights_digest: str
    licence: str | None = None

    @classmethod
    def of(cls, ref: ModelRef, licence: str | None = None) -> BaseModelIdentity:
        """The identity that a ModelRef names."""
        return cls(
            source=ref.source,
            revision=ref.revision,
            config_digest=ref.config_digest,
            weights_digest=ref.weights_digest,
            licence=licence,
        )


class StageRecord(_Frozen):
    """Wall-clock seconds and peak bytes of one stage."""

    name: str
    seconds: float
    peak_resident_bytes: int
    peak_device_bytes: int = 0


class Change(_Frozen):
    """A count before and after pruning."""

    before: int
    after: int

    @property
    def removed(self) -> float:
        """The fraction that is gone."""
        return 1 - self.after / self.before if self.before else 0.0


class PerplexityChange(_Frozen):
    """Perplexity of the dense and the pruned model on `tokens` tokens of a text."""

    text: str
    tokens: int
    before: float
    after: float


class Answers(_Frozen):
    """Greedy answers to `prompt`; '' where there is none."""

    prompt: str
    dense: str = ""
    pruned: str = ""
    recovered: str = ""


class SpeedRecord(_Frozen):
    """Speed of decoding, batch 1, over that of the dense model: asked for, predicted by the plan, and measured."""

    runtime: str
    weights: str
    threads: int
    asked: float
    predicted: float
    reached: float
    dense_tokens_per_second: float
    tokens_per_second: float


class CurvePoint(_Frozen):
    """One step of a training: mean loss in nats, and the validation loss where it was measured."""

    step: int
    tokens: int
    loss: float
    rate: float
    seconds: float
    validation: float | None = None


class RecoveryRecord(_Frozen):
    """How a model was tuned, and what came out.

    left_as_they_are: matrices of the decoder blocks that were not quantised. perplexity: by state of the model (dense,
    before, quantised, recovered), on the text that `evaluation` names.
    """

    command: tuple[str, ...] = ()
    settings: dict[str, Any]
    data: tuple[str, ...]
    data_digest: str
    examples: int
    held_examples: int
    processes: int
    device: str
    dtype: str
    versions: dict[str, str]
    stages: tuple[StageRecord, ...] = ()
    curve: tuple[CurvePoint, ...]
    validation_before: float
    validation: float
    best_step: int
    tokens: int
    seconds: float
    stopped_by: str
    packed_bytes: int | None = None
    left_as_they_are: tuple[str, ...] = ()
    evaluation: str
    evaluation_tokens: int
    perplexity: dict[str, float]


class RunManifest(_Frozen):
    """Everything needed to know, and to repeat, how a pruned model was made.

    command: the arguments as typed. settings: all settings with their defaults. versions: of the packages and Python.
    digests: of graph, calibration, scores and plan, and, in adaptive folders, of the code that opens them. bytes: of
    the weights in `dtype`, dense and pruned alike. answers: greedy ones to a short prompt. speed: where a
    speed-up was asked for. recovery: of a model that
    was tuned afterwards.
    """

    format_version: Literal[1] = 1
    base: BaseModelIdentity
    command: tuple[str, ...] = ()
    settings: dict[str, Any]
    seed: int
    layout: Layout
    device: str
    dtype: str
    versions: dict[str, str]
    digests: dict[str, str]
    stages: tuple[StageRecord, ...] = ()
    parameters: Change
    block_parameters: Change
    bytes: Change
    perplexity: PerplexityChange | None = None
    answers: Answers | None = None
    speed: SpeedRecord | None = None
    recovery: RecoveryRecord | None = None


def recorded_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
