"""Tokens per second of prefill and decode at batch 1.

Compared runtimes run interleaved, so a busy machine slows all of them alike.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from saap.models.walk.walker import last_logit_only

Source = str | Path | nn.Module
"""A model to measure: its location, or the loaded model."""


class Runtime(Protocol):
    """A model opened in a runtime that keeps a cache of the tokens so far.

    vocabulary: number of tokens. bytes_per_token: weight bytes read for one token. A class in the registry
    `saap.settings.registry.RuntimeName` also has `package`, whose version affects the speed; `in_memory`, whether it
    accepts a loaded model; `weights(source, settings)`, their type; and the context manager `opened(source, settings)`.
    """

    vocabulary: int
    bytes_per_token: int

    def read(self, ids: Sequence[int]) -> int:
        """Clear the cache, process the tokens, and return the most likely next token."""

    def step(self, token: int) -> int:
        """Process one more token and return the most likely next token."""


class CachedModel:
    """A transformers model with its key-value cache; the name of the cache argument depends on the version."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._cache: Any = None
        known = inspect.signature(model.forward).parameters
        self._options = last_logit_only(model)
        self._name = "cache" if "cache" in known else "past_key_values"

    def forget(self) -> None:
        """Start a new sequence."""
        self._cache = None

    @torch.no_grad()
    def feed(self, ids: Sequence[int]) -> Tensor:
        """Process further tokens. Returns the logits (vocabulary,) of the next token."""
        inputs = torch.tensor([list(ids)], device=self._device)
        output = self._model(inputs, **{self._name: self._cache}, use_cache=True, **self._options)
        self._cache = output[self._name]
        logits: Tensor = output.logits[0, -1]
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Times of one runtime by round. read_seconds: of the prompt; step_seconds: of the median new token.

    prefill, decode: medians over the rounds, in tokens per second.
    """

    prefill: float
    decode: float
    read_seconds: tuple[float, ...]
    step_seconds: tuple[float, ...]


def speed_ups(faster: Speed, than: Speed) -> tuple[float, float]:
    """Speed-ups of prefill and decode: the median of the ratios of each round.

    In one round, both runtimes see the same load of the machine.
    """
    pairs = ((than.read_seconds, faster.read_seconds), (than.step_seconds, faster.step_seconds))
    prefill, decode = (statistics.median(a / b for a, b in zip(above, below, strict=True)) for above, below in pairs)
    return prefill, decode


def measure_speeds(
    runtimes: Sequence[Runtime],
    prompt: Sequence[int],
    *,
    new_tokens: int = 32,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Speed]:
    """Speed of each runtime on the same prompt, after one warm-up round.

    In each round every runtime processes the prompt and then generates `new_tokens`; rounds rotate the order of the
    runtimes. The time per new token of a round is the median over its tokens, so short disturbances do not count.
    clock: seconds.
    """
    taken: list[list[tuple[float, float]]] = [[] for _ in runtimes]
    for number in range(rounds + 1):
        for turn in range(len(runtimes)):
            place = (number + turn) % len(runtimes)
            taken[place].append(_one_round(runtimes[place], prompt, new_tokens, clock))
    found = []
    for _, *counted in taken:
        read, step = zip(*counted, strict=True)
        prefill, decode = (
            statistics.median(n / time for time in times) for n, times in ((len(prompt), read), (1, step))
        )
        found.append(Speed(prefill=prefill, decode=decode, read_seconds=read, step_seconds=step))
    return found


def _one_round(
    runtime: Runtime, prompt: Sequence[int], new_tokens: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of prefill, and of the median decoding step."""
    start = clock()
    token = runtime.read(prompt)
    now = clock()
    read, steps = now - start, []
    for _ in range(new_tokens):
        token = runtime.step(token)
        before, now = now, clock()
        steps.append(now - before)
    return read, statistics.median(steps)
