"""Strategies: from scores and a budget to sizes of modules and an order of their units.

A strategy is a function (graph, slots, scores, budget) -> Proposal and one entry in STRATEGIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saap.core.records import FloatArray, IntArray, ModelGraph, Role, UnitScores
from saap.settings.prune import Strategy
from saap.structure_search.allocation import AnyBudget, counts_of, keep_of, steps_by_score, steps_by_share, take_steps
from saap.structure_search.slots import Slot
from saap.structure_search.stability import relative_volatility, standardised_fluctuation

Scores = Mapping[str, UnitScores]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A structure that a strategy proposes.

    sizes: kept units of each slot. orders: group name -> its units from the first to leave to the last.
    """

    name: str
    sizes: tuple[int, ...]
    orders: Mapping[str, IntArray]

    def keep(self, slots: Sequence[Slot]) -> dict[str, tuple[int, ...]]:
        """Kept unit indices of every group of the slots."""
        return keep_of(counts_of(slots, self.sizes), lambda name: self.orders[name].tolist())


def importance_order(scores: Scores) -> dict[str, IntArray]:
    """Units from the least to the most important."""
    return {name: np.argsort(score.mean, kind="stable") for name, score in scores.items()}


def volatility_order(scores: Scores, indicator: Callable[[UnitScores], FloatArray]) -> dict[str, IntArray]:
    """Units from the most to the least volatile: the literal rule."""
    return {name: np.argsort(-indicator(score), kind="stable") for name, score in scores.items()}


def module_importance(slots: Sequence[Slot], scores: Scores) -> FloatArray:
    """Importance of each slot as a whole: the score of its units per parameter, (slots,)."""
    return np.array(
        [
            np.mean([scores[group.name].mean.mean() for group in slot.groups])
            * len(slot.groups)
            / slot.parameters_per_unit
            for slot in slots
        ]
    )


def module_shares(slots: Sequence[Slot], scores: Scores, *, spread: float, attention: float = 1.0) -> list[float]:
    """Share of its units that each slot gives, relative to the others: exp(-spread * z).

    z: log of the module's importance, standardised over the modules of its role. scores: not negative. attention:
    factor on the shares of attention modules. A spread of 0 is the uniform rule.
    """
    values = np.log(np.maximum(module_importance(slots, scores), 1e-300))
    shares = np.ones(len(slots))
    for role in {slot.role for slot in slots}:
        where = np.array([slot.role is role for slot in slots])
        deviation = values[where] - values[where].mean()
        scale = deviation.std()
        shares[where] = np.exp(-spread * deviation / scale) if scale > 0 else 1.0
        if role in (Role.ATTENTION, Role.QUERY):
            shares[where] *= attention
    return shares.tolist()


def uniform(graph: ModelGraph, slots: Sequence[Slot], scores: Scores, budget: AnyBudget) -> Proposal:
    """The same share from every module, rounded down to whole units, the least important units of each."""
    steps = steps_by_share(slots, [1.0] * len(slots), round_down=True)
    return Proposal(name="uniform", sizes=take_steps(graph, slots, steps, budget), orders=importance_order(scores))


def importance(graph: ModelGraph, slots: Sequence[Slot], scores: Scores, budget: AnyBudget) -> Proposal:
    """One global ranking of all units by their score per parameter."""
    orders = importance_order(scores)
    steps = steps_by_score(slots, lambda name: scores[name].mean[orders[name]])
    return Proposal(name="importance", sizes=take_steps(graph, slots, steps, budget), orders=orders)


def volatility_z(graph: ModelGraph, slots: Sequence[Slot], scores: Scores, budget: AnyBudget) -> Proposal:
    """SAAP read literally (1): the greatest standardised fluctuation leaves first; modules share by importance."""
    orders = volatility_order(scores, lambda score: standardised_fluctuation(score.variance))
    return _literal("volatility-z", graph, slots, scores, budget, orders)


def volatility_cv(graph: ModelGraph, slots: Sequence[Slot], scores: Scores, budget: AnyBudget) -> Proposal:
    """SAAP read literally (2): the greatest coefficient of variation leaves first; modules share by importance."""
    orders = volatility_order(scores, lambda score: relative_volatility(score.mean, score.variance))
    return _literal("volatility-cv", graph, slots, scores, budget, orders)


def _literal(
    name: str,
    graph: ModelGraph,
    slots: Sequence[Slot],
    scores: Scores,
    budget: AnyBudget,
    orders: Mapping[str, IntArray],
) -> Proposal:
    steps = steps_by_share(slots, module_shares(slots, scores, spread=0.3))
    return Proposal(name=name, sizes=take_steps(graph, slots, steps, budget), orders=orders)


STRATEGIES: Mapping[Strategy, Callable[[ModelGraph, Sequence[Slot], Scores, AnyBudget], Proposal]] = {
    Strategy.UNIFORM: uniform,
    Strategy.IMPORTANCE: importance,
    Strategy.VOLATILITY_Z: volatility_z,
    Strategy.VOLATILITY_CV: volatility_cv,
}
