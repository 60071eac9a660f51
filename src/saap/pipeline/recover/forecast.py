"""What a recovery will take and give, from two of its steps and a law of what tokens give."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from saap.core.errors import ConfigurationError
from saap.models.loading.devices import quick_float32_products
from saap.pipeline.recover.context import prepare
from saap.pipeline.recover.run import load_teacher, model_to_train, trainer_of, training_products
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.progress import Reporter, Silent
from saap.recovery.train import Trainer
from saap.settings.recover import RecoverConfig

LAW = 190_000.0, 0.5
"""Tokens T and exponent b of the share of the gap that is closed after n tokens, 1 - (1 + n / T)^-b."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryForecast:
    """Steps, tokens and seconds of a recovery until its first limit, and what it gives.

    parameters: how many are trained. seconds_of_step: measured. validation: loss on the held-out text, now, by the
    teacher, and at the end; the last two and gap_closed are None without a teacher.
    """

    model: str
    parameters: int
    seconds_of_step: float
    steps: int
    tokens: int
    seconds: float
    validation_before: float
    validation_teacher: float | None
    validation: float | None
    gap_closed: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return asdict(self)


def share_after(tokens: float) -> float:
    """Share of the gap to the teacher that is closed after so many tokens, 0 to 1, about.

    Source: a power law in tokens as the P2 law's (Chen et al. 2024), fitted to `docs/results/recovery.md`.
    """
    scale, exponent = LAW
    return 1 - math.pow(1 + tokens / scale, -exponent)


def forecast(
    source: str | Path, config: RecoverConfig, options: RunOptions, reporter: Reporter | None = None
) -> RecoveryForecast:
    """What `run_recover` would take and give; two steps are tried, and nothing is written. Raises SaapError."""
    run = prepare(str(source), config, options, reporter or Silent())
    if run.processes.count > 1:
        raise ConfigurationError("--dry-run tries one process alone", "Start it without torchrun or accelerate launch")
    teacher, (model, _, parameters) = load_teacher(run), model_to_train(run)
    trainer = trainer_of(run, model, teacher, parameters, Path())
    with quick_float32_products(), training_products(run):
        clock = perf_counter()
        taught = None if trainer.teacher is None else trainer.held_out_loss(trainer.teacher)
        before = trainer.held_out_loss(trainer.walker)
        validating = (perf_counter() - clock) / (1 if taught is None else 2)
        step = trainer.seconds_of_step()
    steps, tokens = _until_limit(run.config, trainer, step + validating / config.validate_every)
    closed = None if taught is None else share_after(tokens)
    return RecoveryForecast(
        model=str(source), parameters=sum(one.numel() for one in trainer.parameters.values()), seconds_of_step=step,
        steps=steps, tokens=tokens, seconds=steps * (step + validating / config.validate_every),
        validation_before=before, validation_teacher=taught, gap_closed=closed,
        validation=None if taught is None or closed is None else before - closed * (before - taught),
    )  # fmt: skip


def _until_limit(config: RecoverConfig, trainer: Trainer, seconds: float) -> tuple[int, int]:
    """Steps until the first limit, and their tokens. seconds: of a step."""
    each = config.batch * fmean(len(one.tokens) for one in trainer.data.train)
    minutes = config.minutes
    limits = (
        math.inf if config.max_steps is None else config.max_steps,
        math.inf if config.max_tokens is None else math.ceil(config.max_tokens / each),
        math.inf if minutes is None else math.ceil(60 * minutes / seconds),
    )
    steps = int(min(limits))
    return steps, round(steps * each)
