"""Speed comparison of models in one of the runtimes of the registry."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from saap.core.evaluation_records import ModelSpeed, SpeedReport
from saap.evaluation.speed import Runtime, Source, Speed, measure_speeds, speed_ups
from saap.settings.evaluate import SpeedSettings


def compare_speeds(models: Sequence[tuple[str, Source]], settings: SpeedSettings) -> SpeedReport:
    """Speed of the first model, and its speed-up over the second if there is one.

    models: (name, a model or anything that `saap prune` accepts). Raises ModelError, ExportError for a model that the
    runtime does not support, ConfigurationError for a missing package.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(opened_in(model, settings)) for _, model in models]
        speeds = timed(opened, settings)
    first, *others = [
        ModelSpeed(model=name, prefill=speed.prefill, decode=speed.decode, bytes_per_token=one.bytes_per_token)
        for (name, _), speed, one in zip(models, speeds, opened, strict=True)
    ]
    compared: dict[str, Any] = settings.model_dump(include={"prompt_tokens", "new_tokens", "rounds"})
    if others:
        compared["against"] = others[0]
        compared["prefill_speedup"], compared["decode_speedup"] = speed_ups(*speeds)
        compared["bytes_ratio"] = others[0].bytes_per_token / first.bytes_per_token
    return SpeedReport(
        runtime=str(settings.runtime), weights=weights_name(models[0][1], settings), threads=torch.get_num_threads(),
        model=first, **compared,
    )  # fmt: skip


def timed(models: Sequence[Runtime], settings: SpeedSettings) -> list[Speed]:
    """Speed of each model, measured interleaved, with torch's default matmul precision."""
    vocabulary = min(one.vocabulary for one in models)
    prompt = [index * 7 % vocabulary for index in range(1, settings.prompt_tokens + 1)]  # any ids are as fast
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return measure_speeds(models, prompt, new_tokens=settings.new_tokens, rounds=settings.rounds)
    finally:
        torch.set_float32_matmul_precision(precision)


def pair_of_speeds(first: Source, second: Source, settings: SpeedSettings) -> tuple[Speed, Speed]:
    """Interleaved speeds of two models."""
    with opened_in(first, settings) as one, opened_in(second, settings) as other:
        fast, slow = timed([one, other], settings)
    return fast, slow


def weights_name(source: Source, settings: SpeedSettings) -> str:
    """Type of the weights in the runtime."""
    return str(settings.runtime.load().weights(source, settings))


def opened_in(source: Source, settings: SpeedSettings) -> AbstractContextManager[Runtime]:
    """The model in the runtime of the settings. Raises ModelError, ExportError."""
    opened: AbstractContextManager[Runtime] = settings.runtime.load().opened(source, settings)
    return opened
