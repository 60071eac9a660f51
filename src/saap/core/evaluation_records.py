"""Records of evaluations, written by `saap eval` and `saap compare` and read by the report pages.

Fields with a default may be missing in a file: pages need only the others. Requires pydantic, but not torch.
"""

from __future__ import annotations

import math
import sys
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, computed_field

from saap.core.storage import Amount, Count

COMPARISON = "comparison.json"
Share = Annotated[Amount, Field(ge=0, le=1)]
Positive = Annotated[Amount, Field(gt=0)]


def _positive(value: float) -> float:
    if value <= 0:
        raise ValueError("should be greater than 0")
    return value


_FiniteInJson = PlainSerializer(lambda v: v if v is not None and math.isfinite(v) else None, return_type=float | None)
Figure = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value), _FiniteInJson]
"""A measured number, null in JSON if it is not finite."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Perplexity(_Record):
    """value: exp(nll). nll: mean negative log-likelihood in nats over the predicted tokens, `tokens` of them.

    window: tokens per window; the first of each is context only. stride: tokens between the starts of two windows. If
    it is less than the window, each token is predicted once, in the first window that contains it. text_digest: of all
    evaluated token ids. leading: ids (BOS) prepended to each window; they are not part of the text. bits_per_byte: of
    the text, which compares models with different tokens; None if not known.
    """

    value: Annotated[Figure, AfterValidator(_positive)]
    nll: Figure = math.nan
    tokens: Count = 0
    window: Count = 0
    stride: Count = 0
    text_digest: str = ""
    leading: Count = 0
    bits_per_byte: Annotated[float | None, _FiniteInJson] = None

    def over(self, tokens: float) -> Self:
        """The same loss of the text per token, if those were `tokens`: what another tokenizer makes of it."""
        nll = self.nll * self.tokens / tokens
        value = math.exp(nll) if nll < math.log(sys.float_info.max) else math.inf  # NaN compares false
        return self.model_copy(update={"value": nll if math.isnan(nll) else value, "nll": nll, "tokens": round(tokens)})


class ChatPerplexity(_Record):
    """value: exp(nll). nll: mean over the `tokens` tokens of the assistant's turns (`turns` of them), in nats."""

    value: Figure
    nll: Figure
    tokens: Count
    turns: Count


class TaskResult(_Record):
    """Accuracies of one task, and their standard errors over the questions.

    acc: the choice with the greatest log-likelihood is the right one. acc_norm: log-likelihoods divided by the
    choice's characters; None where the choices differ before the text that is scored (WinoGrande). chance: accuracy of
    guessing. correct, correct_norm: by question, in file order. source: `hub`, or the local file's name.
    """

    acc: Share
    acc_stderr: Share
    acc_norm: Share | None = None
    acc_norm_stderr: Share | None = None
    chance: Share
    questions: Count = 0
    source: str = ""
    correct: tuple[int, ...] = ()
    correct_norm: tuple[int, ...] | None = None


class Interval(_Record):
    """An estimate and its 95 % interval; NaN if undefined."""

    value: Figure
    low: Figure
    high: Figure


class GenerationFigures(_Record):
    """Measures of the continuations of all open prompts in one mode.

    distinct_1..3: distinct n-grams over all n-grams. repetition: seq-rep-4. tokens: mean length. dense_perplexity: of
    the continuations under the dense model, given their prompts. dense_perplexity_by_quarter, repetition_by_quarter:
    the same for each quarter of the continuations, to show degeneration along the way.
    """

    distinct_1: Figure = math.nan
    distinct_2: Figure = math.nan
    distinct_3: Figure = math.nan
    repetition: Figure = math.nan
    tokens: Figure = math.nan
    dense_perplexity: Annotated[float | None, _FiniteInJson] = None
    dense_perplexity_by_quarter: tuple[Figure, ...] | None = None
    repetition_by_quarter: tuple[Figure, ...] = ()


class ClozeFigures(_Record):
    """Facts: how many of `prompts` the model continues with the answer, and the mean log-likelihood of the answers.

    An answer counts if each of its tokens is the most likely one. answer_nll: nats per token.
    """

    accuracy: Share
    answer_nll: Figure = math.nan
    prompts: Count
    correct: tuple[int, ...] = ()


class GenerationReport(_Record):
    """Generated text by mode, and its measures. samples: mode -> prompt -> model -> text."""

    figures: dict[str, GenerationFigures] = {}
    dense_figures: dict[str, GenerationFigures] | None = None
    token_agreement: Share | None = None
    cloze: ClozeFigures | None = None
    dense_cloze: ClozeFigures | None = None
    samples: dict[str, dict[str, dict[str, str]]] = {}


class ModelSpeed(_Record):
    """Tokens per second of prefill and decode; bytes of the weights read for each decoded token."""

    model: str
    prefill: Positive
    decode: Positive
    bytes_per_token: Count


class SpeedReport(_Record):
    """Speed of a model and its speed-up over another model; None without another model.

    weights: type of the weights in the runtime. speedups: medians of the ratios of all rounds. bytes_ratio: bytes per
    token of the other model over those of this model: the decoding speed-up if memory bandwidth is the only limit.
    """

    runtime: str
    weights: str
    threads: Count
    prompt_tokens: Count = 0
    new_tokens: Count = 0
    rounds: Count = 0
    model: ModelSpeed
    against: ModelSpeed | None = None
    prefill_speedup: Positive | None = None
    decode_speedup: Positive | None = None
    bytes_ratio: Positive | None = None


class EvalReport(_Record):
    """Measurements of a model by name of the text or task. dense: the same for the dense model, if requested."""

    model: str
    revision: str | None = None
    parameters: Count = 0
    perplexity: dict[str, Perplexity] = {}
    tasks: dict[str, TaskResult] = {}
    generation: GenerationReport | None = None
    chat: ChatPerplexity | None = None
    speed: SpeedReport | None = None
    dense: EvalReport | None = None
    command: tuple[str, ...] = ()
    versions: dict[str, str] = {}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tasks_mean(self) -> dict[str, float] | None:
        """Plain means over the tasks of acc and of acc_norm; tasks without acc_norm count with acc."""
        if not self.tasks:
            return None
        results = self.tasks.values()
        normalised = [result.acc if result.acc_norm is None else result.acc_norm for result in results]
        count = len(results)
        return {"acc": sum(result.acc for result in results) / count, "acc_norm": sum(normalised) / count}

    def as_dict(self) -> dict[str, Any]:
        """Content of the report file; numbers that are not finite are None, null in JSON."""
        return self.model_dump(mode="json")


class ComparedModel(_Record):
    """Measurements of every model in `saap compare`. tokens_per_second: prefill speed on the first text."""

    parameters: Count
    perplexity: Annotated[dict[str, Perplexity], Field(min_length=1)]
    tasks: dict[str, TaskResult]
    tokens_per_second: Positive | None


class DenseRow(ComparedModel):
    """The dense model of a comparison. asked: settings of the tasks, None if they were not run."""

    block_parameters: Count = 0
    asked: dict[str, Any] | None = None


class StageSeconds(_Record):
    """Seconds spent on a pruned model; a pass shared by several methods counts for each of them."""

    score: Annotated[Amount, Field(ge=0)]
    search: Annotated[Amount, Field(ge=0)]
    make: Annotated[Amount, Field(ge=0)]

    @property
    def total(self) -> float:
        """All of them."""
        return self.score + self.search + self.make


class ComparisonRow(ComparedModel):
    """A pruned model of a comparison.

    ratio: the requested pruning ratio; pruning_ratio: the reached one. ratios: perplexity relative to the dense model,
    by text. kept_accuracy: share of the dense accuracy above chance.
    """

    method: str
    ratio: Share
    seed: Count
    restored: bool
    pruning_ratio: Amount
    ratios: dict[str, Positive | None]
    kept_accuracy: Interval | None
    seconds: StageSeconds
    peak_resident_bytes: Count


class Comparison(_Record):
    """The content of `comparison.json`."""

    model: str
    dense: DenseRow
    rows: Annotated[tuple[ComparisonRow, ...], Field(min_length=1)]
    settings: dict[str, Any]
    versions: dict[str, str]
    command: tuple[str, ...] = ()

    def at_ratio(self, ratio: float) -> list[ComparisonRow]:
        """The rows of one pruning ratio; of each method only that of its first seed."""
        found: dict[tuple[str, bool], ComparisonRow] = {}
        for row in self.rows:
            if row.ratio == ratio:
                found.setdefault((row.method, row.restored), row)
        return list(found.values())

    @property
    def ratios(self) -> list[float]:
        """The pruning ratios, ascending."""
        return sorted({row.ratio for row in self.rows})

    @property
    def methods(self) -> list[str]:
        """The methods, in the order of their first row."""
        return list(dict.fromkeys(row.method for row in self.rows))
