"""Tokens per second: of reading a prompt (prefill) and of writing one token after another (decode, batch 1).

The runtimes to compare run in turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn

from saap.core.errors import ConfigurationError

Source = str | Path | nn.Module
"""A model to measure: where it lies, or itself."""


class Runtime(Protocol):
    """A model, open in a program that reads tokens and keeps what it needs of them for the next ones.

    A class of the registry `saap.settings.registry.RuntimeName` also has `package`, the one whose version its speed
    depends on; `in_memory`, whether it takes a model that is loaded already; `weights(source, settings)`, their type;
    and the context manager `opened(source, settings)`.
    """

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the weights that one token reads."""

    def read(self, ids: Sequence[int]) -> int:
        """Forget everything, read the tokens, and return the most likely next one."""

    def step(self, token: int) -> int:
        """Read one more token and return the most likely next one."""


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
    runtimes: Mapping[str, Runtime],
    prompt: Sequence[int],
    *,
    new_tokens: int = 32,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Speed]:
    """Speed of each runtime on the same prompt, after one round that is not counted.

    In each round every runtime reads the prompt and then writes `new_tokens`; the one that begins changes from round to
    round. The time of a round's new token is the median over them, so that a short disturbance does not count.
    clock: seconds. Raises ConfigurationError for an empty prompt or fewer than one token or round.
    """
    if not prompt or new_tokens < 1 or rounds < 1:
        raise ConfigurationError("a speed needs a prompt, new tokens and rounds", "Give at least 1 of each")
    names = list(runtimes)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken = _one_round(runtimes[name], prompt, new_tokens, clock)
            if number > 0:
                seconds[name].append(taken)
    return {
        name: Speed(
            prefill=statistics.median(len(prompt) / read for read, _ in taken),
            decode=statistics.median(1 / step for _, step in taken),
            read_seconds=tuple(read for read, _ in taken),
            step_seconds=tuple(step for _, step in taken),
        )
        for name, taken in seconds.items()
    }


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
