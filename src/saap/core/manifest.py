"""The manifest of a result: model, settings, environment and outcome of the run."""

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
# an infinite number is null in JSON
Perplexity = Annotated[float, Field(gt=0), BeforeValidator(lambda value: math.inf if value is None else value)]


class BaseModelIdentity(Strict):
    """The dense model. licence: as stated by its model card, None if unknown."""

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
    """Perplexity of the dense and the pruned model on `tokens` tokens of a text.

    Both are per token of the dense model, so they compare even if the pruned one has a smaller vocabulary.
    """

    text: str
    tokens: Count
    before: Perplexity
    after: Perplexity

    @property
    def ratio(self) -> float:
        """Perplexity after over before."""
        return self.after / self.before


class KindChange(PerplexityChange):
    """The same for one kind of text. bits_per_byte: of the dense model on it; None if not finite."""

    bits_per_byte: Amount | None

    @property
    def bits_per_byte_after(self) -> float | None:
        """Bits per byte of the pruned model on it."""
        if self.bits_per_byte is None or self.before <= 1 or not math.isfinite(self.after):
            return None
        return self.bits_per_byte * math.log(self.after) / math.log(self.before)


class TextTokens(Strict):
    """Tokens of a text of `bytes` bytes with the dense model's tokenizer and the pruned one's."""

    bytes: Count
    before: Count
    after: Count

    @property
    def bytes_per_token(self) -> tuple[float, float]:
        """Before and after."""
        return self.bytes / max(1, self.before), self.bytes / max(1, self.after)


class VocabularyRecord(Strict):
    """What was removed of the vocabulary.

    languages: whose tokens stay. tokens, rows: of the embedding; rows without a token are removed. scripts: tokens by
    writing system. texts: tokens of the evaluation texts, by kind.
    """

    languages: tuple[str, ...]
    tokens: Change
    rows: Change
    scripts: dict[str, Change]
    texts: dict[str, TextTokens]

    def largest_scripts(self, most: int = 8) -> dict[str, Change]:
        """The scripts with the most tokens, and all others together."""
        first, others = list(self.scripts.items())[:most], list(self.scripts.values())[most:]
        sums = Change(before=sum(one.before for one in others), after=sum(one.after for one in others))
        return dict(first) | ({"all others": sums} if others else {})


class Answers(Strict):
    """Greedy answers to `prompt`; '' if there is none."""

    prompt: str
    dense: str = ""
    pruned: str = ""
    recovered: str = ""


class SpeedRecord(Strict):
    """Decoding speed-up over the dense model at batch 1: requested, predicted by the plan, and measured."""

    runtime: str
    weights: str
    threads: Count
    asked: Amount
    predicted: Amount
    reached: Amount
    dense_tokens_per_second: Amount
    tokens_per_second: Amount


class CurvePoint(Strict):
    """One training step: mean loss in nats, and the validation loss if it was measured."""

    step: Count
    tokens: Count
    loss: Amount
    rate: Amount
    seconds: Seconds
    validation: Amount | None = None


class RecoveryRecord(Strict):
    """Record of a recovery: settings and outcome.

    validation_teacher: loss of the teacher on the held-out text. left_as_they_are: matrices of the decoder blocks that
    were not quantised. perplexity: by state of the model (dense, before, quantised, recovered), on the text
    `evaluation`.
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
    validation_teacher: Amount | None = None
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


class Opening(Strict):
    """The result opened in another program after it was written.

    version: of the program's package. code: what ran, with PATH for the folder; a command if it begins with `saap`.
    written: the continuation of a prompt, or a comparison. error: why it failed, None if it did not.
    """

    consumer: str
    version: str
    code: str
    written: str = ""
    error: str | None = None


class RunManifest(Strict):
    """Everything needed to understand and reproduce a pruned model.

    command: the arguments as typed. settings: all settings with their defaults. versions: of the packages and Python.
    digests: of graph, calibration, scores and plan. bytes: of the weights in `dtype`, dense and pruned alike. answers:
    greedy answers to a short prompt. speed: if a speed-up was requested. kinds: perplexity on each kind of text.
    recovery: if the model was tuned afterwards. opened: in other programs, if that was requested.
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
    opened: tuple[Opening, ...] = ()
    vocabulary: VocabularyRecord | None = None

    @property
    def is_pruned(self) -> bool:
        """Whether the model has lost anything, and was not only tuned."""
        return self.parameters.after < self.parameters.before or self.recovery is None

    @property
    def latest_perplexity(self) -> PerplexityChange | None:
        """Of the dense model and the written one; None if a tuned one was not compared with it."""
        tuned = self.recovery
        if tuned is None:
            return self.perplexity
        before, after = (tuned.perplexity.get(state) for state in ("dense", "recovered"))
        if before is None or after is None:
            return None
        return PerplexityChange(text=tuned.evaluation, tokens=tuned.evaluation_tokens, before=before, after=after)


def read_manifest(folder: Path) -> RunManifest | None:
    """Read the manifest of a folder, None if there is none. Raises ModelError if it is damaged."""
    file = folder / "saap" / "manifest.json"
    try:
        return RunManifest.model_validate_json(file.read_bytes()) if file.is_file() else None
    except (OSError, ValidationError) as error:
        fault = f"{file} is not a manifest of this version ({faults_of(error)})"
        raise ModelError(fault, "Use the saap that wrote it, or copy the file again") from None


def recorded_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a result."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def typed_command() -> tuple[str, ...]:
    """Arguments of `saap` as typed; empty if this process is not the command line.

    The command line is the program `saap` or `python -m saap`, also under torchrun or accelerate launch.
    """
    program = Path(sys.argv[0])
    is_ours = program.stem == "saap" or program.parts[-2:] == ("saap", "__main__.py")
    return tuple(sys.argv[1:]) if is_ours else ()
