"""Bootstrap intervals of paired comparisons on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from saap.core.evaluation_records import Interval, TaskResult

DRAWS = 2000
NORMALISED = ("hellaswag", "arc_challenge", "openbookqa")
"""Tasks that are usually reported by acc_norm; the others by acc."""

Answers = Sequence[Sequence[int]]
"""Right (1) or wrong (0): one sequence of questions for each task."""


def usual_answers(name: str, result: TaskResult) -> tuple[int, ...]:
    """Right (1) or wrong (0) by question, under the task's usual scoring."""
    normalised = result.correct_norm if name in NORMALISED else None
    return result.correct if normalised is None else normalised


def kept_accuracy(dense: Mapping[str, TaskResult], pruned: Mapping[str, TaskResult]) -> Interval:
    """Share of the dense model's accuracy above chance that is kept (see `kept_share`), on the tasks of both."""
    before, after = ([usual_answers(name, model[name]) for name in dense] for model in (dense, pruned))
    return kept_share(before, after, [result.chance for result in dense.values()])


def kept_share(dense: Answers, pruned: Answers, chance: Sequence[float], *, than: Answers | None = None) -> Interval:
    """Sum over tasks of (accuracy - chance), pruned over dense. chance: by task.

    than: another model; the result is then the difference of the kept shares. If its interval excludes 0, the
    difference is larger than the sampling error of the questions.
    Interval: percentile bootstrap over the questions of each task, with the same draws for all models; NaN if the dense
    model is not above chance. Raises ValueError if numbers of tasks or questions differ.
    """
    models = [dense, pruned] if than is None else [dense, pruned, than]
    generator = np.random.default_rng(0)
    above = np.zeros((3, 1 + DRAWS))  # of all questions, then of each draw
    for *answered, guess in zip(*models, chance, strict=True):
        answers = np.array(answered, dtype=np.int8)
        index = generator.integers(0, answers.shape[1], (DRAWS, answers.shape[1]))
        above[: len(models), 0] += answers.mean(1) - guess
        above[: len(models), 1:] += answers[:, index].mean(2) - guess
    base, part = above[0], above[1] - above[2]
    if base[0] <= 0:
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"))
    usable = base[1:] > 0
    low, high = np.percentile(part[1:][usable] / base[1:][usable], [2.5, 97.5])
    return Interval(value=float(part[0] / base[0]), low=float(low), high=float(high))
