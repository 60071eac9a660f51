from __future__ import annotations

import pytest

from saap.evaluation.generation import distinct, repetition


def test_distinct_ngrams_of_all_sequences_together():
    assert distinct([[1, 2, 1], [2, 3]], 1) == pytest.approx(3 / 5)
    assert distinct([[1, 2, 1], [2, 3]], 2) == 1.0
    assert distinct([[1]], 2) == 0.0


def test_repetition_is_the_mean_over_sequences():
    # 1 2 1 2 1: bigrams 12 21 12 21, half of them new; 1 2 3: all new; [4] has none
    assert repetition([[1, 2, 1, 2, 1], [1, 2, 3], [4]], n=2) == pytest.approx((0.5 + 0.0) / 2)
    assert repetition([], n=4) == 0.0
