"""Adaptive importance fusion: vector-wise and element-wise scores weighted by learned uncertainties.

minimise over sigma: mean over the units of a scope of sum_m I_m / (2 sigma_m^2) + log sigma_m, m in {vector, element}.
Sources: SAAP; homoscedastic uncertainty, Kendall, Gal and Cipolla 2018.

The minimised sum itself is not usable as the importance of a module. Importances of real models are far below one nat,
so its logarithms make it negative, which rules out shares and ratios. See `fused`.
"""

from collections import defaultdict
from collections.abc import Callable

import numpy as np

from saap.core.records import FloatArray, GroupScores, ImportanceScores, ModelGraph, UnitScores, require_same
from saap.estimation.importance import Scoring
from saap.settings.prune import FusionScope

_LEAST_MEAN = 1e-100
"""Floor of the mean importance, so that sigma is positive."""


def closed_form_sigma(importances: FloatArray) -> float:
    """The sigma that minimises mean(I) / (2 sigma^2) + log sigma: the square root of the mean importance.

    importances: (units,) of one scope and one granularity, not negative.
    """
    return float(np.sqrt(max(float(importances.mean()), _LEAST_MEAN)))


def learned_sigma(
    importances: FloatArray, *, rate: float = 0.25, tolerance: float = 1e-12, steps: int = 10_000
) -> float:
    """The same sigma by gradient descent on s = log sigma from s = 0.

    The derivative is 1 - mean(I) exp(-2 s); its lower side is clipped at -1, as it grows without bound there.
    rate: step size. Ends when the derivative is below `tolerance`, or after `steps` steps.
    """
    mean = max(float(importances.mean()), _LEAST_MEAN)
    log_mean, log_sigma = np.log(mean), 0.0
    for _ in range(steps):
        derivative = 1 - np.exp(min(log_mean - 2 * log_sigma, np.log(2.0)))
        if abs(derivative) < tolerance:
            break
        log_sigma -= rate * float(derivative)
    return float(np.exp(log_sigma))


def fused(scores: GroupScores, sigma_vector: float, sigma_element: float, samples: int) -> UnitScores:
    """Fused importance of each unit of a group in nats, not negative: mean and variance over the samples.

    I = sigma_vec sigma_el (I_vec / (2 sigma_vec^2) + I_el / (2 sigma_el^2)).
    Inside a scope this orders units as the paper's sum does, which also has the terms log sigma_m. Across scopes its
    mean is sigma_vec sigma_el, the geometric mean of the two mean importances. The mean of the paper's sum is 1 +
    log(sigma_vec sigma_el), which gives the same order.
    With a, b the factors of the two scores Var = a^2 V_vec + b^2 V_el + 2 a b Cov, with samples - 1 degrees of freedom.
    """
    a, b = 0.5 * sigma_element / sigma_vector, 0.5 * sigma_vector / sigma_element
    mean = a * scores.vector + b * scores.element
    m2 = a * a * scores.vector_m2 + b * b * scores.element_m2 + 2 * a * b * scores.comoment
    return UnitScores(mean=mean, variance=np.maximum(m2, 0) / (samples - 1))


def fuse(
    scores: ImportanceScores,
    graph: ModelGraph,
    scope: FusionScope = FusionScope.LAYER_ROLE,
    sigma_of: Callable[[FloatArray], float] = closed_form_sigma,
) -> dict[str, UnitScores]:
    """Fused score of every scored group by its name; one pair of sigmas for all units that share a scope.

    Raises StaleInputError if the scores were made for another graph.
    """
    require_same("The importance scores", expected=scores.graph_digest, found=graph.digest)
    shared: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
    for group in graph.groups:
        if group.name in scores.groups:
            shared[tuple(getattr(group, part) for part in ("layer", "role") if part in scope)].append(group.name)
    result: dict[str, UnitScores] = {}
    for names in shared.values():
        vector = sigma_of(np.concatenate([scores.groups[name].vector for name in names]))
        element = sigma_of(np.concatenate([scores.groups[name].element for name in names]))
        for name in names:
            result[name] = fused(scores.groups[name], vector, element, scores.samples)
    return result


FUSED = Scoring(units=fuse)
