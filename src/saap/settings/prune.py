"""The settings of `saap prune`: one place for names, defaults and their reasons."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from saap.core.errors import ConfigurationError
from saap.core.records import Layout, Role
from saap.settings.registry import Importance, Method, Strategy


class ElementOrder(StrEnum):
    """Which terms of the Taylor expansion the element-wise score keeps."""

    FIRST = "1"
    SECOND = "2"
    MIXED = "mixed"


class Aggregation(StrEnum):
    """How the scores of a unit's members become one."""

    SUM = "sum"
    PROD = "prod"
    MAX = "max"
    LAST = "last"


class FusionScope(StrEnum):
    """Which units share one pair of uncertainties in the fusion."""

    GLOBAL = "global"
    ROLE = "role"
    LAYER = "layer"
    LAYER_ROLE = "layer-role"


class RuntimeName(StrEnum):
    """Which program computes the model where its speed is measured."""

    TRANSFORMERS = "transformers"
    LLAMA_CPP = "llama.cpp"


class GgufType(StrEnum):
    """How the weights of a GGUF file are stored."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"


class Effort(StrEnum):
    """How much time search and restoration may take."""

    FAST = "fast"
    DEFAULT = "default"
    BEST = "best"


class PrunableRole(StrEnum):
    """What may be removed: channels of a role, or whole decoder blocks."""

    FFN = "ffn"
    ATTENTION = "attention"
    QUERY = "query"
    EXPERT = "expert"
    HIDDEN = "hidden"
    BLOCK = "block"


def unit_roles(roles: tuple[PrunableRole, ...]) -> tuple[Role, ...]:
    """The roles whose units are removed one by one: all but whole blocks."""
    return tuple(Role(role.value) for role in roles if role is not PrunableRole.BLOCK)


def check_seed(seed: int) -> None:
    """Raise ConfigurationError for a seed that a generator of random numbers does not take."""
    if not 0 <= seed < 2**32:
        raise ConfigurationError(f"--seed {seed} is out of range", "Give a whole number from 0 to 4294967295")


class MethodChoice(BaseModel):
    """A method of a comparison, and the roles that it may prune; None leaves them to the comparison."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    roles: tuple[PrunableRole, ...] | None = None

    @property
    def label(self) -> str:
        """As the command line names it: METHOD or METHOD@ROLE+ROLE."""
        return str(self.method) if self.roles is None else f"{self.method}@{'+'.join(self.roles)}"


class SkipLayers(BaseModel):
    """Decoder blocks at both ends that give nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: Annotated[int, Field(ge=0)] = 0
    last: Annotated[int, Field(ge=0)] = 0

    def layers(self, blocks: int) -> tuple[int, ...]:
        """Indices of the skipped blocks among `blocks`."""
        return tuple(layer for layer in range(blocks) if layer < self.first or layer >= blocks - self.last)


class EffortSettings(BaseModel):
    """What an effort level buys.

    refit_sequences x refit_length: tokens of the restoration. search_evaluations: candidates that the search may
    measure. held_sequences x held_length: tokens each of them is measured on. second_order: choose the units of a
    module by the pruned stream's own second-order statistics instead of the scores. generated_sequences: how many
    sequences the model itself writes for the default calibration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    refit_sequences: int
    refit_length: int = 512
    search_evaluations: int
    held_sequences: int
    held_length: int = 128
    second_order: bool = True
    generated_sequences: int = 0


EFFORTS: dict[Effort, EffortSettings] = {
    Effort.FAST: EffortSettings(refit_sequences=16, search_evaluations=0, held_sequences=8),
    Effort.DEFAULT: EffortSettings(refit_sequences=256, search_evaluations=12, held_sequences=16),
    Effort.BEST: EffortSettings(refit_sequences=384, search_evaluations=32, held_sequences=24, generated_sequences=64),
}


class PruneConfig(BaseModel):
    """Everything that decides the result of `saap prune`, checked before any model is loaded.

    Exactly one of pruning_ratios, target_parameters (whole model), target_bytes (weights as written) and target_speedup
    (of decoding, batch 1, in `runtime`; `gguf_type`: of the weights in llama.cpp).
    skip_layers None leaves the ends to the search. refit_tokens None takes the effort level's. bos: whether windows of
    text begin with the tokenizer's BOS token, if it puts one before texts. method: a baseline
    brings its own strategy and scores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = Method.SAAP
    pruning_ratios: tuple[float, ...] = ()
    target_parameters: int | None = None
    target_bytes: int | None = None
    target_speedup: float | None = None
    runtime: RuntimeName = RuntimeName.TRANSFORMERS
    gguf_type: GgufType = GgufType.F16
    plan: Path | None = None
    calibration: tuple[str, ...] = ("mixed",)
    samples: int = 50
    sample_length: int = 128
    refit_tokens: int | None = None
    bos: bool = True
    layout: Layout = Layout.ADAPTIVE
    roles: tuple[PrunableRole, ...] = (PrunableRole.FFN, PrunableRole.ATTENTION)
    skip_layers: SkipLayers | None = None
    align: int = 32
    strategy: Strategy = Strategy.ADAPTIVE
    importance: Importance = Importance.FUSED
    element_order: ElementOrder = ElementOrder.SECOND
    aggregation: Aggregation = Aggregation.SUM
    fusion_scope: FusionScope = FusionScope.LAYER_ROLE
    restore: bool = True
    effort: Effort = Effort.DEFAULT
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _restore_by_method(cls, given: Any) -> Any:
        """Baselines run as they were published, so only our own method restores without being told to."""
        if isinstance(given, dict) and "restore" not in given:
            return {**given, "restore": given.get("method", Method.SAAP) == Method.SAAP}
        return given

    @model_validator(mode="after")
    def _check(self) -> PruneConfig:
        targets = {
            "--pruning-ratio": bool(self.pruning_ratios),
            "--target-params": self.target_parameters is not None,
            "--target-size": self.target_bytes is not None,
            "--target-speedup": self.target_speedup is not None,
            "--plan": self.plan is not None,
        }
        given = [name for name, is_given in targets.items() if is_given]
        if len(given) != 1:
            problem = f"{' and '.join(given)} were given together" if given else "no target was given"
            raise ConfigurationError(problem, f"Give exactly one of {', '.join(targets)}")
        for ratio in self.pruning_ratios:
            if not 0 <= ratio < 1:
                raise ConfigurationError(
                    f"--pruning-ratio {ratio:g} is out of range", "Give a fraction of at least 0 and below 1, e.g. 0.2"
                )
        if len(set(self.pruning_ratios)) < len(self.pruning_ratios):
            raise ConfigurationError("--pruning-ratio names the same ratio twice", "Name each ratio once")
        for flag, value, least in (
            ("--samples", self.samples, 2), ("--sample-length", self.sample_length, 8), ("--align", self.align, 1),
            ("--refit-tokens", self.refit_tokens, 1024), ("--target-params", self.target_parameters, 1),
            ("--target-size", self.target_bytes, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ConfigurationError(f"{flag} {value} is too small", f"Give at least {least}")
        check_seed(self.seed)
        if not self.roles:
            raise ConfigurationError("--roles is empty", f"Name some of {', '.join(PrunableRole)}")
        if not self.calibration:
            raise ConfigurationError("--calibration is empty", "Name a text file, a data set or `mixed`")
        if self.skip_layers is not None and self.layout is Layout.UNIFORM and self.skip_layers != SkipLayers():
            raise ConfigurationError(
                "--skip-layers cannot be combined with --layout uniform, where all layers share their sizes",
                "Leave out one of the two",
            )
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> PruneConfig:
        if {PrunableRole.ATTENTION, PrunableRole.QUERY} <= set(self.roles):
            raise ConfigurationError(
                "The roles attention and query cannot be combined: a KV group leaves with its query heads",
                "Name one of the two in --roles",
            )
        return self

    @model_validator(mode="after")
    def _check_speedup(self) -> PruneConfig:
        if self.target_speedup is None:
            return self
        if not 1 < self.target_speedup < float("inf"):
            raise ConfigurationError(
                f"--target-speedup {self.target_speedup:g} is out of range", "Give a number above 1, e.g. 1.3"
            )
        unmeasured = [role for role in (PrunableRole.HIDDEN, PrunableRole.EXPERT) if role in self.roles]
        if unmeasured:
            raise ConfigurationError(
                f"--target-speedup cannot be combined with the role {unmeasured[0]}, whose time is not measured",
                "Use --roles ffn,attention,block, or --pruning-ratio",
            )
        return self

    @model_validator(mode="after")
    def _check_method(self) -> PruneConfig:
        own = {
            "--strategy": self.strategy is not Strategy.ADAPTIVE,
            "--importance": self.importance is not Importance.FUSED,
        }
        given = [name for name, is_given in own.items() if is_given]
        if self.method is not Method.SAAP and given:
            raise ConfigurationError(
                f"--method {self.method} has rules of its own, so {' and '.join(given)} cannot be chosen",
                "Leave out one of the two",
            )
        return self

    @property
    def trusts_calibration(self) -> bool:
        """Whether the pruned model is meant for text like the calibration's: a text of the user's own, not `mixed`.

        Second-order costs say how much each module gives by what is predictable on the calibration text. They win there
        and lose on other kinds of text (SmolLM2, 20 %), so the default calibration, which stands for every kind, goes
        without them.
        """
        return self.calibration != ("mixed",)

    @property
    def effort_settings(self) -> EffortSettings:
        """The effort level's settings, with the refit tokens that were asked for."""
        settings = EFFORTS[self.effort]
        if self.refit_tokens is None:
            return settings
        length = min(settings.refit_length, self.refit_tokens // 2)
        return settings.model_copy(update={"refit_sequences": self.refit_tokens // length, "refit_length": length})
