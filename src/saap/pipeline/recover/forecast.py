"""Forecast of a recovery, from a few of its steps and a law of what tokens gain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import perf_counter

from saap.core.errors import ConfigurationError
from saap.models.loading.devices import quick_float32_products
from saap.pipeline.recover.context import prepare
from saap.pipeline.recover.run import check_layers, model_to_train, trainer_of
from saap.pipeline.recover.teacher import check_teacher, load_teacher
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.progress import Reporter, Silent
from saap.settings.recover import RecoverConfig, Tuning

LAWS: Mapping[Tuning, tuple[float, float]] = {Tuning.FULL: (140_000.0, 0.346)}
"""Tokens T and exponent b of the share of the gap that is closed after n tokens, 1 - (1 + n / T)^-b."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryForecast:
    """Costs and gain of a recovery until its first limit.

    parameters: how many are trained. seconds_of_step: with as many tokens as an average one. seconds: of the training
    with its validations. validation_before: loss of the model on the held-out text, in nats per token.
    validation_teacher: that of the teacher, None without one. gap_closed: share of the difference that is closed in the
    end, None without a difference or a law for the tuning. validation: the loss in the end, None with gap_closed.
    """

    model: str
    tuning: Tuning
    parameters: int
    seconds_of_step: float
    steps: int
    tokens: int
    seconds: float
    validation_before: float
    validation_teacher: float | None
    validation: float | None
    gap_closed: float | None


def share_after(tokens: float, tuning: Tuning) -> float:
    """Share of the gap to the teacher that is closed after so many tokens, 0 to 1, about. Raises KeyError.

    Source: a power law in tokens as the P2 law's (Chen et al. 2024), fitted to `docs/results/recovery.md`.
    """
    scale, exponent = LAWS[tuning]
    return 1 - math.pow(1 + tokens / scale, -exponent)


def forecast(
    source: str | Path, config: RecoverConfig, options: RunOptions, reporter: Reporter | None = None
) -> RecoveryForecast:
    """Costs and gain of `run_recover`; a few steps are tried, and nothing is written. Raises SaapError."""
    if config.on_policy:
        raise ConfigurationError("--dry-run does not time what --on-policy writes", "Leave out one of the two")
    if config.teacher_logits is not None:
        raise ConfigurationError(
            "--dry-run does not write --teacher-logits", "Leave that out; the forecast times the teacher in memory"
        )
    run = prepare(str(source), config, options, reporter or Silent())
    check_teacher(run)
    check_layers(run)
    teacher = load_teacher(run) if run.config.distillation else None
    model, _, parameters = model_to_train(run)
    trainer = trainer_of(run, model, teacher, parameters, Path())
    with quick_float32_products():
        of_teacher = trainer.teacher_loss()
        clock = perf_counter()
        before = trainer.held_out_loss(trainer.walker)
        validating = perf_counter() - clock
        tokens_of_step = run.config.batch * fmean(len(one.tokens) for one in run.data.train)
        step = tokens_of_step * trainer.seconds_of_token()
    of_each = step + validating / run.config.validate_every
    limits = ((config.max_steps, 1.0), (config.max_tokens, tokens_of_step), (config.minutes, of_each / 60))
    steps = min(math.ceil(limit / each) for limit, each in limits if limit is not None)
    tokens = round(steps * tokens_of_step)
    tuning, closed, after = run.config.tuning, None, None
    if of_teacher is not None and of_teacher < before and tuning in LAWS:
        closed = share_after(tokens, tuning)
        after = before - closed * (before - of_teacher)
    return RecoveryForecast(
        model=str(source), tuning=tuning, parameters=sum(one.numel() for one in parameters.values()),
        seconds_of_step=step, steps=steps, tokens=tokens, seconds=steps * of_each, validation_before=before,
        validation_teacher=of_teacher, validation=after, gap_closed=closed,
    )  # fmt: skip
