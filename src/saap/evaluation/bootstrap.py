"""Intervals of paired comparisons on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saap.evaluation.zero_shot import TaskResult

DRAWS = 2000
NORMALISED = ("hellaswag", "arc_challenge", "openbookqa")
"""Tasks whose usual figure is acc_norm; of the others it is acc."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def usual_answers(name: str, result: TaskResult) -> tuple[int, ...]:
    """Right (1) or wrong (0) by question, under the task's usual scoring."""
    normalised = result.correct_norm if name in NORMALISED else None
    return result.correct if normalised is None else normalised


def kept_accuracy(
    dense: Mapping[str, TaskResult], pruned: Mapping[str, TaskResult], *, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """How much of the dense model's accuracy above chance is kept: sum over tasks of (acc - chance), pruned over dense.

    Interval: percentile bootstrap over the questions of each task, the same draw for both models. Raises ValueError
    for other tasks or questions.
    """
    return kept_share(
        [usual_answers(name, result) for name, result in dense.items()],
        [usual_answers(name, pruned[name]) for name in dense],
        [result.chance for result in dense.values()],
        seed=seed,
        draws=draws,
    )


def kept_share(
    dense: Sequence[Sequence[int]],
    pruned: Sequence[Sequence[int]],
    chance: Sequence[float],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval:
    """The same of plain 0/1 answers: one sequence of questions for each task. chance: by task."""
    above = _above_chance([dense, pruned], chance, seed=seed, draws=draws)
    return _interval(above[0], above[1])


def kept_difference(
    dense: Sequence[Sequence[int]],
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]],
    chance: Sequence[float],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval:
    """How much more of the dense model's accuracy above chance `first` keeps than `second`, from the same draws.

    An interval without 0 says that the two differ by more than the choice of questions.
    """
    above = _above_chance([dense, first, second], chance, seed=seed, draws=draws)
    return _interval(above[0], above[1] - above[2])


def _above_chance(
    models: Sequence[Sequence[Sequence[int]]], chance: Sequence[float], *, seed: int, draws: int
) -> np.ndarray[Any, Any]:
    """Sum over the tasks of accuracy - chance, (models, 1 + draws): of all questions, then of each draw."""
    generator = np.random.default_rng(seed)
    above = np.zeros((len(models), 1 + draws))
    for *answered, guess in zip(*models, chance, strict=True):
        answers = np.array(answered, dtype=float)
        index = generator.integers(0, answers.shape[1], (draws, answers.shape[1]))
        above[:, 0] += answers.mean(1) - guess
        above[:, 1:] += answers[:, index].mean(2) - guess
    return above


def _interval(base: np.ndarray[Any, Any], part: np.ndarray[Any, Any]) -> Interval:
    """The quotient part / base with the middle 95 % of its draws; NaN where the base has nothing above chance."""
    if base[0] <= 0:
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"))
    usable = base[1:] > 0
    low, high = np.percentile(part[1:][usable] / base[1:][usable], [2.5, 97.5])
    return Interval(value=float(part[0] / base[0]), low=float(low), high=float(high))
