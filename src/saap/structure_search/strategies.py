"""Strategies: from scores and a budget to sizes of modules and an order of their units.

A strategy is a function of a search problem that gives a proposal, and one entry in STRATEGIES. SAAP states the idea of
stability, not its formulas: units whose importance fluctuates most over samples are unstable. The two indicators below
are our readings of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from saap.core.records import FloatArray, IntArray, UnitScores
from saap.settings.prune import Strategy
from saap.structure_search.allocation import Orders, Proposal, Scores, SearchProblem
from saap.structure_search.variables import DecisionVariable


def standardised_fluctuation(variance: FloatArray) -> FloatArray:
    """Reading 1: fluctuation standardised inside its layer, A = (M - mean M) / std M; zeros if all are equal.

    variance: (units,), M over samples of the units of one module. Returns (units,).
    """
    spread = variance.std()
    if spread == 0:
        return np.zeros_like(variance)
    return np.asarray((variance - variance.mean()) / spread)


def relative_volatility(mean: FloatArray, variance: FloatArray) -> FloatArray:
    """Reading 2: coefficient of variation sqrt(M) / mean; 0 where a unit has neither mean nor variance.

    mean (not negative), variance: (units,) over samples. Returns (units,).
    """
    deviation = np.sqrt(np.maximum(variance, 0.0))
    return np.divide(deviation, mean, out=np.where(deviation > 0, np.inf, 0.0), where=mean > 0)


def importance_order(scores: Scores) -> dict[str, IntArray]:
    """Units from the least to the most important."""
    return {name: np.argsort(score.mean, kind="stable") for name, score in scores.items()}


def module_importance(variables: Sequence[DecisionVariable], scores: Scores) -> FloatArray:
    """Importance of what each variable sizes as a whole: the score of its units per parameter, (variables,)."""
    return np.array(
        [
            np.mean([scores[group.name].mean.mean() for group in variable.groups])
            * len(variable.groups)
            / variable.parameters_per_unit
            for variable in variables
        ]
    )


def module_shares(
    variables: Sequence[DecisionVariable], scores: Scores, *, spread: float, attention: float = 1.0
) -> list[float]:
    """Share of its units that each variable loses, relative to the others: exp(-spread * z).

    z: log of the module's importance, standardised over the modules of its role. scores: not negative. attention:
    factor on the shares of attention modules. A spread of 0 is the uniform rule.
    """
    values = np.log(np.maximum(module_importance(variables, scores), 1e-300))
    shares = np.ones(len(variables))
    for role in {variable.role for variable in variables}:
        where = np.array([variable.role is role for variable in variables])
        deviation = values[where] - values[where].mean()
        scale = deviation.std()
        shares[where] = np.exp(-spread * deviation / scale) if scale > 0 else 1.0
    shares[[variable.of_heads for variable in variables]] *= attention
    return shares.tolist()


def uniform(problem: SearchProblem) -> Proposal:
    """The same share from every module, rounded down to whole units, the least important units of each."""
    decrements = problem.by_share([1.0] * len(problem.variables), round_down=True)
    return problem.propose("uniform", decrements, importance_order(problem.scores))


def importance(problem: SearchProblem) -> Proposal:
    """One global ranking of all units by their score per parameter."""
    orders = importance_order(problem.scores)
    decrements = problem.by_score(lambda name: problem.scores[name].mean[orders[name]])
    return problem.propose("importance", decrements, orders)


def volatility_z(problem: SearchProblem) -> Proposal:
    """SAAP read literally (1): the greatest standardised fluctuation is removed first; modules share by importance."""
    return _literal("volatility-z", problem, lambda score: standardised_fluctuation(score.variance))


def volatility_cv(problem: SearchProblem) -> Proposal:
    """SAAP read literally (2): the greatest coefficient of variation is removed first; modules share by importance."""
    return _literal("volatility-cv", problem, lambda score: relative_volatility(score.mean, score.variance))


def _literal(name: str, problem: SearchProblem, indicator: Callable[[UnitScores], FloatArray]) -> Proposal:
    orders: Orders = {group: np.argsort(-indicator(score), kind="stable") for group, score in problem.scores.items()}
    return problem.propose(name, problem.by_share(module_shares(problem.variables, problem.scores, spread=0.3)), orders)


STRATEGIES: Mapping[Strategy, Callable[[SearchProblem], Proposal]] = {
    Strategy.UNIFORM: uniform,
    Strategy.IMPORTANCE: importance,
    Strategy.VOLATILITY_Z: volatility_z,
    Strategy.VOLATILITY_CV: volatility_cv,
}
