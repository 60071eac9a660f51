"""Intervals of paired comparisons on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    generator = np.random.default_rng(seed)
    above = np.zeros((2, 1 + draws))
    for first, second, guess in zip(dense, pruned, chance, strict=True):
        answers = np.array([first, second], dtype=float)
        index = generator.integers(0, answers.shape[1], (draws, answers.shape[1]))
        above[:, 0] += answers.mean(1) - guess
        above[:, 1:] += answers[:, index].mean(2) - guess
    if above[0, 0] <= 0:
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"))
    drawn = above[:, 1:][:, above[0, 1:] > 0]
    low, high = np.percentile(drawn[1] / drawn[0], [2.5, 97.5])
    return Interval(value=float(above[1, 0] / above[0, 0]), low=float(low), high=float(high))
