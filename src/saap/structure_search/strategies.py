"""Strategies: from a search problem to sizes of modules and an order of their units.

SAAP states the idea of stability, not its formulas: units whose importance fluctuates most over samples are unstable.
The two indicators below are our readings of it. The default strategy chooses among the others by measured loss.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from saap.core.records import Candidate, FloatArray, IntArray, UnitScores
from saap.structure_search.problem import (
    DecisionVariable,
    Decrement,
    Evaluator,
    Orders,
    Proposal,
    Scores,
    SearchProblem,
    importance_order,
)

SPREAD = 0.3
"""How much the shares of modules differ by their importance."""

# On SmolLM2, protecting the first 4 and last 2 of 30 layers was measured to beat every rule driven by importance.
FIRST_SHARE, LAST_SHARE = 4 / 30, 2 / 30
ATTENTION_SHARES = (0.5, 1.0)
"""Shares of attention modules, relative to an FFN's, that the search tries one after the other."""
WAVES, WAVE_SCALE = 4, 0.3
"""Number of cosines whose sum bends the log shares of modules, and the spread of the random steps of amplitudes."""
STANDARD_ERRORS = 2.0
"""By how many of the mean difference a loss must be lower to count as clearly lower.

Of a dozen equally good candidates, the best is usually ahead by more than one.
"""
LEAST_SHARE = 0.02
"""What a module that loses nothing counts as losing, so that bent shares can take something from it."""


def uniform(problem: SearchProblem) -> Proposal:
    """The same share from every module, rounded down to whole units, the least important units of each."""
    decrements = problem.by_share([1.0] * len(problem.variables), round_down=True)
    return problem.propose("uniform", decrements, importance_order(problem.scores))


def importance(problem: SearchProblem) -> Proposal:
    """One global ranking of all units by their score per parameter."""
    orders = importance_order(problem.scores)
    decrements = problem.by_score(lambda name: problem.scores[name].mean[orders[name]])
    return problem.propose("importance", decrements, orders)


def stability(problem: SearchProblem) -> Proposal:
    """SAAP's stages: modules share by their importance; of each, the least important of its unstable units go first.

    Unstable is the half whose adaptive stability indicator is greater, read as `relative_volatility`.
    """

    def order(score: UnitScores) -> IntArray:
        volatility = relative_volatility(score.mean, score.variance)
        return np.lexsort((score.mean, volatility < np.median(volatility)))

    return _shared_by_importance("stability", problem, order)


def volatility_z(problem: SearchProblem) -> Proposal:
    """SAAP read literally (1): the greatest standardised fluctuation is removed first; modules share by importance."""
    return _shared_by_importance(
        "volatility-z", problem, lambda score: _greatest_first(standardised_fluctuation(score.variance))
    )


def volatility_cv(problem: SearchProblem) -> Proposal:
    """SAAP read literally (2): the greatest coefficient of variation is removed first; modules share by importance."""
    return _shared_by_importance(
        "volatility-cv", problem, lambda score: _greatest_first(relative_volatility(score.mean, score.variance))
    )


def _greatest_first(indicator: FloatArray) -> IntArray:
    return np.argsort(-indicator, kind="stable")


def _shared_by_importance(name: str, problem: SearchProblem, order: Callable[[UnitScores], IntArray]) -> Proposal:
    orders: Orders = {group: _unused_first(order(score), score) for group, score in problem.scores.items()}
    return problem.propose(name, problem.by_share(module_shares(problem.variables, problem.scores)), orders)


def _unused_first(order: IntArray, score: UnitScores) -> IntArray:
    """The order, after the units that never act (experts without tokens): their score never fluctuates either."""
    return order[np.argsort(score.mean[order] != 0, kind="stable")]


def standardised_fluctuation(variance: FloatArray) -> FloatArray:
    """Reading 1: fluctuation standardised inside its layer, A = (M - mean M) / std M; zeros if all are equal.

    variance: (units,), M over samples of the units of one module. Returns (units,).
    """
    spread = variance.std()
    return np.asarray((variance - variance.mean()) / spread) if spread > 0 else np.zeros_like(variance)


def relative_volatility(mean: FloatArray, variance: FloatArray) -> FloatArray:
    """Reading 2: coefficient of variation sqrt(M) / mean; 0 where a unit has neither mean nor variance.

    mean (not negative), variance: (units,) over samples. Returns (units,).
    """
    deviation = np.sqrt(np.maximum(variance, 0.0))
    return np.divide(deviation, mean, out=np.where(deviation > 0, np.inf, 0.0), where=mean > 0)


def module_importance(variables: Sequence[DecisionVariable], scores: Scores) -> FloatArray:
    """Importance of what each variable sizes as a whole: the score of its units per parameter, (variables,)."""
    values = []
    for variable in variables:
        mean = np.mean([scores[group.name].mean.mean() for group in variable.groups])
        values.append(mean * len(variable.groups) / variable.parameters_per_unit)
    return np.array(values)


def module_shares(variables: Sequence[DecisionVariable], scores: Scores, *, attention: float = 1.0) -> list[float]:
    """Share of its units that each variable loses, relative to the others: exp(-SPREAD * z).

    z: log of the module's importance, standardised over the modules of its role. scores: not negative. attention:
    factor on the shares of attention modules.
    """
    values = np.log(np.maximum(module_importance(variables, scores), 1e-300))
    shares = np.ones(len(variables))
    for role in {variable.role for variable in variables}:
        where = np.array([variable.role is role for variable in variables])
        deviation = values[where] - values[where].mean()
        scale = deviation.std()
        shares[where] = np.exp(-SPREAD * deviation / scale) if scale > 0 else 1.0
    shares[[variable.of_heads for variable in variables]] *= attention
    return shares.tolist()


class _Measured(NamedTuple):
    """A candidate, the units that it keeps, and its losses on the held-out samples, (samples,)."""

    proposal: Proposal
    keep: dict[str, tuple[int, ...]]
    losses: FloatArray

    @property
    def loss(self) -> float:
        """Their mean; infinite if one is not finite."""
        return float(self.losses.mean()) if np.isfinite(self.losses).all() else np.inf

    def is_clearly_better(self, other: "_Measured") -> bool:
        """Whether its loss is lower by more than STANDARD_ERRORS of the mean difference.

        One sample has no such error, so it decides nothing; losses that are not finite are worse than all others.
        """
        if np.inf in (self.loss, other.loss) or len(self.losses) < 2:
            return self.loss < np.inf == other.loss
        difference = other.losses - self.losses
        return bool(difference.mean() > STANDARD_ERRORS * difference.std(ddof=1) / np.sqrt(len(difference)))


class _Trail:
    """The candidates that were measured, each once, and no more than the problem allows."""

    def __init__(self, problem: SearchProblem, evaluator: Evaluator) -> None:
        self._problem, self._evaluator = problem, evaluator
        self.measured: list[_Measured] = []

    def add(self, proposal: Proposal) -> _Measured | None:
        """It, or the equal plan that was measured already; None if no evaluation is left."""
        keep = proposal.keep(self._problem.variables)
        known = next((one for one in self.measured if one.keep == keep), None)
        if known is not None or len(self.measured) >= self._problem.guide.evaluations:
            return known
        self.measured.append(_Measured(proposal, keep, self._evaluator(keep, self._problem.dropped)))
        self._problem.guide.progress(len(self.measured), self._problem.guide.evaluations)
        return self.measured[-1]

    def with_attention(self, best: _Measured) -> _Measured:
        """A uniform plan with the largest share of attention up to which each step made it clearly better.

        A step that changes nothing, as half a share of few heads, is not the last.
        """
        for share in ATTENTION_SHARES if _of_both(self._problem) else ():
            found = self.add(_uniform(self._problem, share, best.proposal.orders))
            if found is None or (found is not best and not found.is_clearly_better(best)):
                break
            best = found
        return best

    def evolved(self, best: _Measured) -> _Measured:
        """The best of its children, one after the other: each bends the sizes of the best one so far at random."""
        problem, generator, parent = self._problem, np.random.default_rng(0), np.zeros(WAVES)
        pairs = zip(problem.variables, best.proposal.sizes, strict=True)
        shares = np.array([max(1 - size / variable.units, LEAST_SHARE) for variable, size in pairs])
        waves = _waves(problem)
        for index in range(problem.guide.evaluations):  # each child may equal one that was measured
            amplitudes = parent + generator.normal(0, WAVE_SCALE, WAVES)
            decrements = problem.by_share((shares * np.exp(waves @ amplitudes)).tolist())
            child = self.add(problem.propose(f"evolution {index}", decrements, best.proposal.orders))
            if child is None:
                break
            if child.loss < best.loss:
                best, parent = child, amplitudes
        return best

    def of(self, best: _Measured) -> Proposal:
        """The best proposal, with all that were measured."""
        self._problem.guide.progress(self._problem.guide.evaluations, self._problem.guide.evaluations)
        order = sorted(self.measured, key=lambda one: (one is not best, one.loss))
        trail = tuple(Candidate(name=one.proposal.name, loss=one.loss) for one in order)
        return dataclasses.replace(best.proposal, trail=trail)


def adaptive(problem: SearchProblem) -> Proposal:
    """The first candidate unless the loss of another is clearly lower, with the trail of all that were measured.

    First comes one ranking of all units by second-order cost, where that is known; then a uniform plan, FFN alone and
    both ends protected, from which attention's share grows; plans by the importance of modules and of units; and an
    evolution of the best of these, which bends how much is removed over the depth. One candidate replaces another only
    if its loss is lower by more than two standard errors of the difference, after the rule of Breiman et al. (1984):
    the fewer samples, the larger must a difference be. In the evolution the lower loss is enough, until the best is
    compared with the first candidate.
    """
    starts, evaluator = _starts(problem), problem.guide.evaluator
    if evaluator is None or problem.guide.evaluations < 2:
        return starts[0]
    trail = _Trail(problem, evaluator)
    for start in starts:
        trail.add(start)
    first, best = trail.measured[0], trail.with_attention(trail.measured[-1])
    for proposal in _by_importance(problem, starts[0].orders):
        found = trail.add(proposal)
        if found is not None and found.is_clearly_better(best):
            best = found
    best = trail.evolved(best if best.is_clearly_better(first) else first)
    return trail.of(best if best.is_clearly_better(first) else first)


def _starts(problem: SearchProblem) -> list[Proposal]:
    """The most promising first, in the same order of units: a ranking by second-order cost, if known; equal shares."""
    ranking, costs = _ranking(problem), problem.guide.costs
    if ranking is None or costs is None:
        return [_uniform(problem, _least_of_attention(problem), importance_order(problem.scores))]
    orders = {**costs.orders}
    equal = _uniform(problem, _least_of_attention(problem), orders)
    return [problem.propose("second-order cost", ranking, orders), equal]


def default_ends(blocks: int) -> tuple[int, int]:
    """How many of the first and of the last blocks are protected by default."""
    return round(FIRST_SHARE * blocks), round(LAST_SHARE * blocks)


def protected_layers(blocks: int) -> tuple[int, ...]:
    """Layers at both ends that lose nothing by default."""
    first, last = default_ends(blocks)
    return tuple(layer for layer in range(blocks) if layer < first or layer >= blocks - last)


def _ranking(problem: SearchProblem) -> list[Decrement] | None:
    """Decrements of all variables by second-order cost per parameter, where that is known for all of them."""
    costs = problem.guide.costs
    groups = [group.name for variable in problem.variables for group in variable.groups]
    if costs is None or any(name not in costs.orders for name in groups):
        return None
    return problem.by_score(lambda name: costs.scores[name][costs.orders[name]])


def _least_of_attention(problem: SearchProblem) -> float:
    """The share of attention in the first plan: none, where there is anything else."""
    return float(all(one.of_heads for one in problem.variables))


def _uniform(problem: SearchProblem, attention: float, orders: Orders) -> Proposal:
    """Equal shares of all variables, but attention's own, and none of those that lie at protected ends alone."""
    first, last = default_ends(len(problem.graph.blocks))
    ends = set(protected_layers(len(problem.graph.blocks))) if problem.protects_ends else set[int]()
    protected = [all(group.layer in ends for group in one.groups) for one in problem.variables]
    parts = ["uniform"]
    parts += [f"attention {attention:g}"] if attention and _of_both(problem) else []
    parts += [f"first {first} and last {last} protected"] if any(protected) else []
    each = [
        0.0 if at_end else attention if one.of_heads else 1.0
        for one, at_end in zip(problem.variables, protected, strict=True)
    ]
    return problem.propose(", ".join(parts), problem.by_share(each), orders)


def _by_importance(problem: SearchProblem, orders: Orders) -> list[Proposal]:
    """Plans in which importance decides how much each module loses: its own, or that of its units."""
    shares = module_shares(problem.variables, problem.scores, attention=0.3)
    return [problem.propose("module importance", problem.by_share(shares), orders), importance(problem)]


def _waves(problem: SearchProblem) -> FloatArray:
    """Cosines over the depth of the model at the place of each variable, (variables, WAVES)."""
    layers = [np.mean([group.layer for group in variable.groups]) for variable in problem.variables]
    places = (np.array(layers) + 0.5) / max(1, len(problem.graph.blocks))
    return np.cos(np.pi * np.outer(places, np.arange(1, WAVES + 1)))


def _of_both(problem: SearchProblem) -> bool:
    """Whether there are attention modules and others."""
    return len({variable.of_heads for variable in problem.variables}) == 2
