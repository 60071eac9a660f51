"""Measures shared by several experiments: pure functions of arrays and sets."""

import base64
import zlib
from collections.abc import Collection, Sequence

import numpy as np
from scipy import stats

from saap.core.records import FloatArray, ModelGraph, StructurePlan

Pairs = Sequence[tuple[FloatArray, FloatArray]]


def rank_correlation(first: FloatArray, second: FloatArray) -> float:
    """Spearman's coefficient; 0 if one of the two is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(stats.spearmanr(first, second).statistic)


def rank_correlation_inside(groups: Pairs) -> float:
    """Mean over the groups of the rank correlation inside each group."""
    return float(np.mean([rank_correlation(first, second) for first, second in groups]))


def rank_correlation_overall(groups: Pairs) -> float:
    return rank_correlation(np.concatenate([a for a, _ in groups]), np.concatenate([b for _, b in groups]))


def correlation_interval(groups: Pairs, *, seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """95 % percentile interval of `rank_correlation_inside`, by bootstrap over the units of each group."""
    generator = np.random.default_rng(seed)
    total = np.zeros(draws)
    for first, second in groups:
        drawn = generator.integers(len(first), size=(draws, len(first)))
        total += _row_correlation(stats.rankdata(first[drawn], axis=1), stats.rankdata(second[drawn], axis=1))
    low, high = np.quantile(total / len(groups), (0.025, 0.975))
    return float(low), float(high)


def _row_correlation(first: FloatArray, second: FloatArray) -> FloatArray:
    """Pearson's coefficient of each row; 0 if one of the two is constant."""
    first = first - first.mean(1, keepdims=True)
    second = second - second.mean(1, keepdims=True)
    scale = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    return np.asarray(np.divide((first * second).sum(1), scale, out=np.zeros(len(first)), where=scale > 0))


def reliability(first_half: FloatArray, second_half: FloatArray) -> float:
    """Rank correlation of a perfect predictor with a quantity as noisy as the mean of two halves.

    The Spearman-Brown formula gives the reliability r of the whole from the correlation of its halves; the ceiling is
    sqrt(r). 0 if the halves do not agree.
    """
    halves = rank_correlation(first_half, second_half)
    return float(np.sqrt(max(0.0, 2 * halves / (1 + halves)))) if halves > -1 else 0.0


def jaccard(first: Collection[object], second: Collection[object]) -> float:
    """Jaccard index: intersection over union; 1 for two empty sets."""
    one, other = set(first), set(second)
    return len(one & other) / len(one | other) if one | other else 1.0


def as_bits(units: Collection[int]) -> str:
    """A set of unit numbers as a compressed bit mask in base64."""
    bits = np.zeros(max(units, default=-1) + 1, dtype=bool)
    bits[list(units)] = True
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()


def from_bits(text: str) -> frozenset[int]:
    packed = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return frozenset(np.flatnonzero(np.unpackbits(packed)).tolist())


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 of a single value)."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0


def variance_slope(mean: FloatArray, variance: FloatArray) -> float:
    """Slope of log variance against log mean, by least squares over units with positive values.

    0: equal variance for small and large units (homoscedastic); 2: the deviation is proportional to the mean.
    """
    positive = (mean > 0) & (variance > 0)
    x, y = np.log(mean[positive]), np.log(variance[positive])
    if len(x) < 2 or np.ptp(x) == 0:
        return float("nan")
    return float(np.polyfit(x, y, 1)[0])


def chi_square_distance(importances: FloatArray) -> float:
    """Kolmogorov-Smirnov distance of I / mean(I) from the chi-square distribution with one degree of freedom.

    The uncertainty weighting of Kendall et al. is the likelihood of normal residuals r with r^2 = I and one variance
    sigma^2 = mean(I) for all, so that I / sigma^2 has this distribution. importances: (units,) of one scope, >= 0.
    """
    mean = importances.mean()
    if mean <= 0:
        return 1.0
    return float(stats.kstest(importances / mean, stats.chi2(1).cdf).statistic)


def log_histogram(values: FloatArray, edges: FloatArray) -> list[float]:
    """Share of the positive values between consecutive edges of log10; outliers count in the outer bins."""
    logs = np.clip(np.log10(values[values > 0]), edges[0], edges[-1])
    counts, _ = np.histogram(logs, bins=edges)
    return [float(count) for count in counts / max(1, len(logs))]


def removed_units(plan: StructurePlan, graph: ModelGraph) -> set[tuple[str, int]]:
    planned = [group for group in graph.groups if group.name in plan.keep]
    return {(one.name, unit) for one in planned for unit in set(range(one.units)) - set(plan.keep[one.name])}


def sampled_units(units: int, wanted: int, seed: int) -> list[int]:
    """Units drawn without replacement, ascending; all of them if there are at most `wanted`."""
    drawn = np.random.default_rng(seed).choice(units, size=min(units, wanted), replace=False)
    return sorted(int(unit) for unit in drawn)


def spread_layers(layers: int, wanted: int) -> Sequence[int]:
    return sorted({round(place) for place in np.linspace(0, layers - 1, min(wanted, layers))})
