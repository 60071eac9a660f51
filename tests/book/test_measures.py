from __future__ import annotations

import math

import numpy as np
import pytest
from lab.measures import (
    as_bits,
    chi_square_distance,
    correlation_interval,
    from_bits,
    jaccard,
    log_histogram,
    mean_and_spread,
    rank_correlation,
    rank_correlation_inside,
    rank_correlation_overall,
    reliability,
    variance_slope,
)


def test_rank_correlation_by_hand():
    # ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    assert rank_correlation(np.array([1.0, 2, 3, 4]), np.array([20.0, 10, 40, 30])) == pytest.approx(0.6)
    assert rank_correlation(np.ones(4), np.arange(4.0)) == 0.0


def test_inside_and_overall_differ_where_groups_lie_apart():
    low, high = np.array([1.0, 2, 3]), np.array([11.0, 12, 13])
    groups = [(low, low[::-1].copy()), (high, high[::-1].copy())]
    assert rank_correlation_inside(groups) == pytest.approx(-1.0)
    assert rank_correlation_overall(groups) > 0


def test_the_bootstrap_interval_holds_the_value_and_shrinks_with_more_units():
    generator = np.random.default_rng(0)

    def width(units: int) -> float:
        x = generator.normal(size=units)
        pairs = [(x, x + generator.normal(size=units))]
        low, high = correlation_interval(pairs, draws=200)
        assert low < rank_correlation_inside(pairs) < high
        return high - low

    assert width(400) < 0.5 * width(25)


def test_reliability_is_the_root_of_the_spearman_brown_formula():
    halves = np.array([1.0, 2, 3, 4]), np.array([20.0, 10, 40, 30])
    assert reliability(*halves) == pytest.approx(math.sqrt(2 * 0.6 / 1.6))
    assert reliability(np.arange(4.0), -np.arange(4.0)) == 0.0


def test_sets_of_units_come_back_from_their_bits():
    assert len(as_bits(range(0, 1536, 5))) < 60
    assert from_bits(as_bits({0, 5, 1535})) == {0, 5, 1535}
    assert from_bits(as_bits(())) == frozenset()


def test_jaccard_and_spread():
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5
    assert jaccard(set(), set()) == 1.0
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_and_spread([2.0]) == (2.0, 0.0)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_slope_of_the_variance_is_its_power(power):
    mean = np.array([0.1, 1.0, 5.0, 0.0])
    assert variance_slope(mean, 3 * mean**power) == pytest.approx(power)


def test_squared_normal_residuals_pass_and_equal_importances_do_not():
    generator = np.random.default_rng(0)
    assert chi_square_distance(7 * generator.normal(size=20000) ** 2) < 0.02
    assert chi_square_distance(np.full(100, 3.0)) > 0.3
    assert chi_square_distance(np.zeros(5)) == 1.0


def test_a_histogram_counts_all_positive_values():
    shares = log_histogram(np.array([1e-9, 1e-3, 0.5, 100.0, 0.0]), np.array([-4.0, -2.0, 0.0]))
    assert shares == [0.5, 0.5]
