from __future__ import annotations

import math

import pytest

from saap.evaluation.bootstrap import kept_share


def test_kept_share_is_above_chance_and_paired() -> None:
    dense, pruned = [[1, 1, 1, 0], [1, 0]], [[1, 1, 0, 0], [1, 0]]
    # above chance: dense (0.75 - 0.25) + (0.5 - 0.5), pruned (0.5 - 0.25) + 0
    assert kept_share(dense, pruned, [0.25, 0.5]).value == pytest.approx(0.5)


def test_the_interval_of_equal_models_has_no_width() -> None:
    answers = [[1, 0, 1, 1] * 20]
    found = kept_share(answers, answers, [0.25])
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_more_questions_narrow_the_interval() -> None:
    few = kept_share([[1, 1, 1, 0] * 5], [[1, 0, 1, 0] * 5], [0.25])
    many = kept_share([[1, 1, 1, 0] * 80], [[1, 0, 1, 0] * 80], [0.25])
    assert few.low < many.low < many.value < many.high < few.high
    assert few == kept_share([[1, 1, 1, 0] * 5], [[1, 0, 1, 0] * 5], [0.25])


def test_a_dense_model_at_chance_has_nothing_to_keep() -> None:
    assert math.isnan(kept_share([[1, 0]], [[1, 1]], [0.5]).value)


def test_the_difference_of_two_models_is_paired() -> None:
    dense, better, worse = [[1, 1, 1, 0] * 20], [[1, 1, 0, 0] * 20], [[1, 0, 0, 0] * 20]
    found = kept_share(dense, better, [0.25], than=worse)
    # above chance: dense 0.5, better 0.25, worse 0
    assert found.value == pytest.approx(0.5)
    assert 0 < found.low < found.value < found.high
    swapped = kept_share(dense, worse, [0.25], than=better)
    assert (swapped.value, swapped.low) == (pytest.approx(-found.value), pytest.approx(-found.high))
    assert kept_share(dense, better, [0.25], than=better).high == 0
