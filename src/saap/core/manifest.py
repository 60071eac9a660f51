"""The record of a run that lies in its result: what was done to which model, with what, and what came out."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from saap.core.errors import ModelError
from saap.core.roles import Layout
from saap.core.storage import Amount, Count, Strict, faults_of

RECORDED_PACKAGES = ("saap", "torch", "transformers", "safetensors", "numpy", "tokenizers", "gguf", "llama-cpp-py-sync")

Seconds = Annotated[Amount, Field(ge=0)]
# JSON says null for an infinite number.
Perplexity = Annotated[float, Field(gt=0), BeforeValidator(lambda value: math.inf if value is None else value)]


class BaseModelIdentity(Strict):
    """The dense model. licence: as its own card states it, None if unknown."""

    source: str
    revision: str | None = None
    config_digest: str
    weights_digest: str
    licence: str | None = None


class StageRecord(Strict):
    """Wall-clock seconds and peak bytes of one stage."""

    name: str
    seconds: Seconds
    peak_resident_bytes: Count
    peak_device_bytes: Count = 0


class Change(Strict):
    """A count before and after pruning."""

    before: Count
    after: Count

    @property
    def removed(self) -> float:
        """The removed fraction."""
        return 1 - self.after / self.before if self.before else 0.0


class PerplexityChange(Strict):
    """Perplexity of the dense and the pruned model on `tokens` tokens of a text."""

    text: str
    tokens: Count
    before: Perplexity
    after: Perplexity

    @property
    def ratio(self) -> float:
        """Perplexity after over before."""
        return self.after / self.before


class KindChange(PerplexityChange):
    """The same of one kind of text. bits_per_byte: that a byte of it costs the dense model; None if not finite."""

    bits_per_byte: Amount | None


class Answers(Strict):
    """Greedy answers to `prompt`; '' where there is none."""

    prompt: str
    dense: str = ""
    pruned: str = ""
    recovered: str = ""


class SpeedRecord(Strict):
    """Speed of decoding, batch 1, over that of the dense model: requested, predicted by the plan, and measured."""

    runtime: str
    weights: str
    threads: Count
    asked: Amount
    predicted: Amount
    reached: Amount
    dense_tokens_per_second: Amount
    tokens_per_second: Amount


class CurvePoint(Strict):
    """One step of a training: mean loss in nats, and the validation loss where it was measured."""

    step: Count
    tokens: Count
    loss: Amount
    rate: Amount
    seconds: Seconds
    validation: Amount | None = None


class RecoveryRecord(Strict):
    """How a model was tuned, and what came out.

    left_as_they_are: matrices of the decoder blocks that were not quantised. perplexity: by state of the model (dense,
    before, quantised, recovered), on the text that `evaluation` names.
    """

    command: tuple[str, ...] = ()
    settings: dict[str, Any]
    data: tuple[str, ...]
    data_digest: str
    examples: Count
    held_examples: Count
    processes: Count
    device: str
    dtype: str
    versions: dict[str, str]
    stages: tuple[StageRecord, ...] = ()
    curve: tuple[CurvePoint, ...]
    validation_before: Amount
    validation: Amount
    best_step: Count
    tokens: Count
    seconds: Seconds
    stopped_by: str
    packed_bytes: Count | None = None
    left_as_they_are: tuple[str, ...] = ()
    evaluation: str
    evaluation_tokens: Count
    perplexity: dict[str, Perplexity]


class RunManifest(Strict):
    """Everything needed to know, and to repeat, how a pruned model was made.

    command: the arguments as typed. settings: all settings with their defaults. versions: of the packages and Python.
    digests: of graph, calibration, scores and plan, and, in adaptive folders, of the code that opens them. bytes: of
    the weights in `dtype`, dense and pruned alike. answers: greedy ones to a short prompt. speed: where a
    speed-up was requested. kinds: the perplexity on each kind of text. recovery: of a model that was tuned afterwards.
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
    kinds: tuple[KindChange, ...] = ()
    answers: Answers | None = None
    speed: SpeedRecord | None = None
    recovery: RecoveryRecord | None = None


def read_manifest(folder: Path) -> RunManifest | None:
    """The manifest of a folder that saap has written, None where there is none. Raises ModelError for a damaged one."""
    file = folder / "saap" / "manifest.json"
    try:
        return RunManifest.model_validate_json(file.read_bytes()) if file.is_file() else None
    except (OSError, ValidationError) as error:
        fault = f"{file} is no manifest of this version ({faults_of(error)})"
        raise ModelError(fault, "Use the saap that wrote it, or copy the file again") from None


def recorded_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def typed_command() -> tuple[str, ...]:
    """The arguments of `saap` as typed, if this process is the command line, else none.

    That is the program `saap`, or what `python -m saap` runs, also under torchrun or accelerate launch.
    """
    program = Path(sys.argv[0])
    is_ours = program.stem == "saap" or program.parts[-2:] == ("saap", "__main__.py")
    return tuple(sys.argv[1:]) if is_ours else ()
