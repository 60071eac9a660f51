"""The settings of `saap recover`: one place for names, defaults and their reasons."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, model_validator

from saap.core.errors import ConfigurationError
from saap.settings.prune import check_seed

DEFAULT_MINUTES = 20.0
LEGAL_BITS = (2, 3, 4, 8)
LEGAL_GROUP_SIZES = (16, 32, 64, 128)


class Tuning(StrEnum):
    """What recovery trains: adapters on quantised weights, or plain LoRA on the weights as they are (reference)."""

    GROUPWISE = "groupwise"
    LORA = "lora"


class RecoverConfig(BaseModel):
    """Everything that decides the result of `saap recover`, checked before any model is loaded.

    batch: one sequence, since many small steps learn more from the tokens of twenty minutes than a quarter as many of
    four sequences (SmolLM2). alpha and length: usual values, not tuned. The first limit that is reached ends the
    training; with none given it is DEFAULT_MINUTES. scales: whether the scales are learned besides the zero
    points. teacher: None for the dense model that the checkpoint was pruned from, if it is on this machine.
    dense_revision, dense_trust_remote_code: of the teacher; by default its revision is that of the checkpoint's
    manifest, and its code is not run.
    distillation: share of the divergence from the teacher in the loss; None for 1 where there is a teacher and 0 where
    there is none. bos: whether each sequence begins with the tokenizer's BOS token, if it puts one before texts.
    exact_products: no float32 factor is rounded to bfloat16 while training. patience: validations
    without a new best, 0 never stops early. shard: whether the frozen weights of model and teacher are split over the
    processes; it changes no result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: tuple[str, ...] = ("mixed",)
    tuning: Tuning = Tuning.GROUPWISE
    bits: int = 4
    group_size: int = 32
    error_feedback: bool = False
    rank: int = 16
    alpha: float = 16.0
    scales: bool = True
    teacher: str | None = None
    dense_revision: str | None = None
    dense_trust_remote_code: bool = False
    distillation: float | None = None
    length: int = 512
    bos: bool = True
    batch: int = 1
    micro_batch: int = 1
    learning_rate: float = 1e-3
    warm_up: float = 0.05
    clip: float = 1.0
    max_steps: int | None = None
    max_tokens: int | None = None
    max_minutes: float | None = None
    validate_every: int = 60
    validation_samples: int = 8
    patience: int = 5
    gradient_checkpointing: bool = True
    exact_products: bool = False
    shard: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> RecoverConfig:
        if self.bits not in LEGAL_BITS:
            raise ConfigurationError(f"--bits {self.bits} is not possible", f"Use {', '.join(map(str, LEGAL_BITS))}")
        if self.group_size not in LEGAL_GROUP_SIZES:
            raise ConfigurationError(
                f"--group-size {self.group_size} is not possible", f"Use {', '.join(map(str, LEGAL_GROUP_SIZES))}"
            )
        for flag, value, least in (
            ("--rank", self.rank, 1), ("--length", self.length, 16), ("--batch", self.batch, 1),
            ("--micro-batch", self.micro_batch, 1), ("--max-steps", self.max_steps, 1),
            ("--max-tokens", self.max_tokens, 1), ("--validate-every", self.validate_every, 1),
            ("--validation-samples", self.validation_samples, 1), ("--patience", self.patience, 0),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ConfigurationError(f"{flag} {value} is too small", f"Give at least {least}")
        for flag, number in (
            ("--learning-rate", self.learning_rate), ("--alpha", self.alpha), ("--clip", self.clip),
            ("--max-minutes", self.max_minutes),
        ):  # fmt: skip
            if number is not None and not 0 < number < float("inf"):
                raise ConfigurationError(f"{flag} {number:g} is out of range", "Give a number above 0")
        check_seed(self.seed)
        if self.distillation is not None and not 0 <= self.distillation <= 1:
            raise ConfigurationError(f"--distillation {self.distillation:g} is out of range", "Give 0 to 1")
        if not 0 <= self.warm_up < 1:
            raise ConfigurationError(f"--warm-up {self.warm_up:g} is out of range", "Give at least 0 and below 1")
        return self

    @model_validator(mode="after")
    def _check_tuning(self) -> RecoverConfig:
        for flag, given in (("--error-feedback", self.error_feedback), ("--shard", self.shard)):
            if given and self.tuning is Tuning.LORA:
                raise ConfigurationError(
                    f"{flag} is about quantised layers, which plain LoRA has not", "Leave out one of the two"
                )
        return self

    @property
    def minutes(self) -> float | None:
        """The limit in minutes; the default where no limit of any kind was given."""
        no_limit = self.max_steps is None and self.max_tokens is None and self.max_minutes is None
        return DEFAULT_MINUTES if no_limit else self.max_minutes
