"""Every indicator of a unit's worth that the project knows, on the same samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lab.dense import Dense, on_device
from lab.measures import chi_square_distance, variance_slope
from saap.baselines.baseline import Measurements
from saap.core.records import CalibrationSet, FloatArray, ImportanceScores
from saap.estimation.estimate import estimate, unit_scores
from saap.estimation.fusion import fuse
from saap.models.walk.backend import Backend
from saap.settings.prune import ElementOrder, FusionScope
from saap.settings.registry import Importance, Method
from saap.structure_search.costs import second_order_costs
from saap.structure_search.strategies import relative_volatility, standardised_fluctuation

ByGroup = Mapping[str, FloatArray]
ELEMENTS = {
    "element-wise, order 1": ElementOrder.FIRST,
    "element-wise, order 2": ElementOrder.SECOND,
    "element-wise, mixed": ElementOrder.MIXED,
}
FUSED, FLUCTUATION = "fused", "fluctuation"
STABILITY = ("volatility-z", "volatility-cv")


def all_estimates(dense: Dense, tokens: CalibrationSet) -> dict[ElementOrder, ImportanceScores]:
    """One estimation for each order of the element-wise importance."""
    return {
        order: estimate(Backend(dense.model, dense.graph), tokens, element_order=order) for order in ELEMENTS.values()
    }


def all_indicators(
    dense: Dense, tokens: CalibrationSet, estimates: Mapping[ElementOrder, ImportanceScores]
) -> dict[str, ByGroup]:
    """By indicator and group, one value for each unit (units,)."""
    graph, scores = dense.graph, estimates[ElementOrder.SECOND]
    fused = fuse(scores, graph, FusionScope.LAYER_ROLE)
    found: dict[str, ByGroup] = {
        "vector-wise": {n: g.vector for n, g in scores.groups.items()},
        **{
            name: {
                n: u.mean
                for n, u in unit_scores(estimates[order], graph, Importance.ELEMENT2, FusionScope.GLOBAL).items()
            }
            for name, order in ELEMENTS.items()
        },
        FUSED: {n: u.mean for n, u in fused.items()},
        FLUCTUATION: {n: u.variance for n, u in fused.items()},
        "volatility-z": {n: standardised_fluctuation(u.variance) for n, u in fused.items()},
        "volatility-cv": {n: relative_volatility(u.mean, u.variance) for n, u in fused.items()},
    }
    ids = on_device(tokens, dense.model)
    costs = second_order_costs(Backend(dense.model, graph), ids)
    found["second-order cost"] = {name: units.mean for name, units in costs.scores.items()}
    measured = Measurements(Backend(dense.model, graph), ids)
    for method in (Method.MAGNITUDE, Method.WANDA_SP, Method.FLAP, Method.RANDOM):
        found[str(method)] = {name: np.asarray(v, np.float64) for name, v in measured.scores(method.load()).items()}
    return found


def residuals(scores: ImportanceScores) -> dict[str, dict[str, float]]:
    """How far the importances are from what the uncertainty weighing assumes, by granularity: means over the modules.

    distance: Kolmogorov-Smirnov, of the importances over their mean from chi-square with one degree of freedom.
    variation: their standard deviation over their mean, the root of 2 if the assumption held. slope: of the log of a
    unit's variance over samples on the log of its mean, 0 if it held.
    """
    found = {}
    for name in ("vector", "element"):
        means = [getattr(group, name) for group in scores.groups.values()]
        spreads = [getattr(group, f"{name}_m2") / (scores.samples - 1) for group in scores.groups.values()]
        slopes = [variance_slope(mean, spread) for mean, spread in zip(means, spreads, strict=True)]
        found[name] = {
            "distance": float(np.mean([chi_square_distance(mean) for mean in means])),
            "variation": float(np.mean([mean.std() / mean.mean() for mean in means if mean.mean() > 0])),
            "slope": float(np.nanmean(slopes)),
        }
    return found
