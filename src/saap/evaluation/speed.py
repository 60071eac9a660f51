"""Tokens per second: of reading a prompt (prefill) and of writing one token after another (decode, batch 1).

The runtimes to compare run in turns, so that a busy machine slows all of them alike.
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

Source = str | Path | nn.Module
"""A model to measure: where it lies, or itself."""


class Runtime(Protocol):
    """A model, open in a program that reads tokens and keeps what it needs of them for the next ones.

    vocabulary: number of tokens. bytes_per_token: of the weights that one token reads.
    A class of the registry `saap.settings.registry.RuntimeName` also has `package`, the one whose version its speed
    depends on; `in_memory`, whether it takes a model that is loaded already; `weights(source, settings)`, their type;
    and the context manager `opened(source, settings)`.
    """

    vocabulary: int
    bytes_per_token: int

    def read(self, ids: Sequence[int]) -> int:
        """Forget everything, read the tokens, and return the most likely next one."""

    def step(self, token: int) -> int:
        """Read one more token and return the most likely next one."""


class CachedModel:
    """A transformers model with its cache of keys and values, whose argument has the name that its version knows."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._cache: Any = None
        known = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._name = "cache" if "cache" in known else "past_key_values"

    def forget(self) -> None:
        """Start a new sequence."""
        self._cache = None

    @torch.no_grad()
    def feed(self, ids: Sequence[int]) -> Tensor:
        """Read further tokens. Returns the logits (vocabulary,) of what follows them."""
        inputs = torch.tensor([list(ids)], device=self._device)
        output = self._model(inputs, **{self._name: self._cache}, use_cache=True, **self._options)
        self._cache = output[self._name]
        logits: Tensor = output.logits[0, -1]
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Time that one runtime took. read_seconds: of the prompt, round by round; step_seconds: of the median new token.

    prefill, decode: medians over the rounds, in tokens per second.
    """

    prefill: float
    decode: float
    read_seconds: tuple[float, ...]
    step_seconds: tuple[float, ...]


def speed_ups(faster: Speed, than: Speed) -> tuple[float, float]:
    """How many times as fast, of prefill and of decode: the median of the ratios of each round.

    In a round both met the same other work.
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
    """Speed of each runtime on the same prompt, after one round that is not counted.

    In each round every runtime reads the prompt and then writes `new_tokens`; the one that begins changes from round to
    round. The time of a round's new token is the median over them, so that a short disturbance does not count.
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
    """Seconds of reading, and of the median step of writing."""
    start = clock()
    token = runtime.read(prompt)
    now = clock()
    read, steps = now - start, []
    for _ in range(new_tokens):
        token = runtime.step(token)
        before, now = now, clock()
        steps.append(now - before)
    return read, statistics.median(steps)
