from __future__ import annotations

from functools import reduce

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from saap.estimation.statistics import Moments, merge


def draw(seed: int, samples: int, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    vector = random.random((samples, 4)) + offset
    return vector, 0.5 * vector + random.random((samples, 4))


def streamed(vector: np.ndarray, element: np.ndarray) -> Moments:
    return reduce(merge, [Moments.of(v, e) for v, e in zip(vector, element, strict=True)])


def check(found: Moments, vector: np.ndarray, element: np.ndarray, tolerance: float = 1e-12) -> None:
    assert found.samples == len(vector)
    np.testing.assert_allclose(found.scores.vector, vector.mean(0), rtol=tolerance)
    np.testing.assert_allclose(found.scores.element, element.mean(0), rtol=tolerance)
    np.testing.assert_allclose(found.scores.vector_m2, vector.var(0) * len(vector), rtol=tolerance)
    np.testing.assert_allclose(found.scores.element_m2, element.var(0) * len(element), rtol=tolerance)
    deviations = (vector - vector.mean(0)) * (element - element.mean(0))
    np.testing.assert_allclose(found.scores.comoment, deviations.sum(0), rtol=tolerance, atol=tolerance)


def test_stream_equals_numpy() -> None:
    vector, element = draw(0, 50)
    check(streamed(vector, element), vector, element)


@given(st.integers(0, 100), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_merge_equals_the_union(seed: int, first: int, second: int) -> None:
    vector, element = draw(seed, first + second)
    parts = (streamed(vector[:first], element[:first]), streamed(vector[first:], element[first:]))
    check(merge(*parts), vector, element, 1e-9)


def test_a_large_mean_does_not_cancel_the_variance() -> None:
    vector, element = draw(1, 30, offset=1e7)
    found = streamed(vector, element)
    np.testing.assert_allclose(found.scores.vector_m2, vector.var(0) * 30, rtol=1e-6)
