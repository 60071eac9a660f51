"""Strategies: from a search problem to sizes of modules and an order of their units.

SAAP states the idea of stability, not its formulas: units whose importance fluctuates most over samples are unstable.
The two indicators below are our readings of it. The default strategy chooses among the others by measured loss.
"""

import dataclasses
from collections.abc import Callable, Sequence
from operator import add
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

# Protecting both ends was measured to beat every rule driven by importance (SmolLM2: first 4 and last 2 of 30 layers).
FIRST_SHARE, LAST_SHARE = 4 / 30, 2 / 30
END_STEP, MOST_PROTECTED = 2 / 30, 20 / 30
"""By how many of all blocks the search moves an end, and how many at most it protects."""
ATTENTION_STEP = 0.5
"""By how much the search moves the share of attention modules, relative to an FFN's."""
MARGIN = 0.1
"""Share of its loss by which another plan must be better than the first one.

Where they differ by less, masking does not tell which of the two is better after a reconstruction, on other text. At
20 % the plans with the least masked loss, 2 % below SmolLM2's first one and 8 % below Gemma's, were then better on some
texts and worse on others. A reconstruction also restores FFN channels better than attention heads.
"""


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


class _Shares(NamedTuple):
    """A uniform plan: what an attention module loses relative to an FFN, and how many blocks are protected at the ends.

    As a move, by how much each of the three changes.
    """

    attention: float
    first: int
    last: int


class _Measured(NamedTuple):
    """A candidate, the units that it keeps, and its losses on the held-out samples, (samples,)."""

    proposal: Proposal
    keep: dict[str, tuple[int, ...]]
    losses: FloatArray

    def is_clearly_better(self, other: "_Measured", margin: float = 0.0) -> bool:
        """Whether its loss is lower by that share and more than the standard error of the mean difference.

        One sample has no such error, so it decides nothing; losses that are not finite are worse than all others.
        """
        finite, others = bool(np.isfinite(self.losses).all()), bool(np.isfinite(other.losses).all())
        if not finite or not others or len(self.losses) < 2:
            return finite and not others
        difference = (1 - margin) * other.losses - self.losses
        return bool(difference.mean() > difference.std(ddof=1) / np.sqrt(len(difference)))


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

    def after_moves(self, start: _Measured) -> _Measured:
        """A uniform plan after all moves that make it clearly better, in the order of `_moves`.

        A move that changes nothing, as half a share of few heads, does not end its direction.
        """
        problem, shares = self._problem, _default_shares(self._problem)
        for move in _moves(problem):
            moved = shares
            while _allowed(moved := _Shares(*map(add, moved, move)), problem):
                found = self.add(_by_shares(problem, moved, start.proposal.orders))
                if found is None:
                    return start
                if found is start:
                    continue
                if not found.is_clearly_better(start):
                    break
                shares, start = moved, found
        return start

    def of(self, best: _Measured) -> Proposal:
        """The best proposal, with all that were measured."""
        self._problem.guide.progress(self._problem.guide.evaluations, self._problem.guide.evaluations)
        losses = {id(one): float(one.losses.mean()) for one in self.measured}
        order = sorted(self.measured, key=lambda one: (one is not best, losses[id(one)]))
        trail = tuple(Candidate(name=one.proposal.name, loss=losses[id(one)]) for one in order)
        return dataclasses.replace(best.proposal, trail=trail)


def adaptive(problem: SearchProblem) -> Proposal:
    """The first candidate unless the loss of another is clearly lower, with the trail of all that were measured.

    First comes one ranking of all units by second-order cost, where that is known; then a uniform plan, FFN alone and
    both ends protected, from which attention's share and the protected ends move step by step; then plans by the
    importance of modules and of units. One candidate replaces another only if its loss is lower by more than the
    standard error of the difference, as in the one-standard-error rule of Breiman et al. (1984): the fewer samples, the
    larger must a difference be. The first one is kept unless the best of the others is better by `MARGIN` as well.
    """
    starts, evaluator = _starts(problem), problem.guide.evaluator
    if evaluator is None or problem.guide.evaluations < 2:
        return starts[0]
    trail = _Trail(problem, evaluator)
    for start in starts:
        trail.add(start)
    first, uniform_start = trail.measured[0], trail.measured[-1]
    best = trail.after_moves(uniform_start)
    for proposal in _by_importance(problem, starts[0].orders):
        other = trail.add(proposal)
        if other is not None and other.is_clearly_better(best):
            best = other
    return trail.of(best if best.is_clearly_better(first, MARGIN) else first)


def _starts(problem: SearchProblem) -> list[Proposal]:
    """The most promising first, in the same order of units: a ranking by second-order cost, if known; equal shares."""
    ranking, costs = _ranking(problem), problem.guide.costs
    if ranking is None or costs is None:
        return [_by_shares(problem, _default_shares(problem), importance_order(problem.scores))]
    orders = {**costs.orders}
    equal = _by_shares(problem, _default_shares(problem), orders)
    return [problem.propose("second-order cost", ranking, orders), equal]


def default_ends(blocks: int) -> tuple[int, int]:
    """How many of the first and of the last blocks are protected by default."""
    return round(FIRST_SHARE * blocks), round(LAST_SHARE * blocks)


def protected_layers(blocks: int, ends: tuple[int, int] | None = None) -> tuple[int, ...]:
    """Layers at both ends that lose least: so many of the first and of the last, or the default."""
    first, last = ends if ends is not None else default_ends(blocks)
    return tuple(layer for layer in range(blocks) if layer < first or layer >= blocks - last)


def _ranking(problem: SearchProblem) -> list[Decrement] | None:
    """Decrements of all variables by second-order cost per parameter, where that is known for all of them."""
    costs = problem.guide.costs
    groups = [group.name for variable in problem.variables for group in variable.groups]
    if costs is None or any(name not in costs.orders for name in groups):
        return None
    return problem.by_score(lambda name: costs.scores[name][costs.orders[name]])


def _default_shares(problem: SearchProblem) -> _Shares:
    """FFN alone, where there is any."""
    return _Shares(float(all(one.of_heads for one in problem.variables)), *default_ends(len(problem.graph.blocks)))


def _by_shares(problem: SearchProblem, shares: _Shares, orders: Orders) -> Proposal:
    """Equal shares of all variables, but attention's own, and none of those that lie at protected ends alone."""
    ends = set(protected_layers(len(problem.graph.blocks), shares[1:])) if problem.protects_ends else set[int]()
    protected = [all(group.layer in ends for group in one.groups) for one in problem.variables]
    parts = ["uniform"]
    parts += [f"attention {shares.attention:g}"] if shares.attention and _of_both(problem) else []
    parts += [f"first {shares.first} and last {shares.last} protected"] if any(protected) else []
    each = [
        0.0 if at_end else shares.attention if one.of_heads else 1.0
        for one, at_end in zip(problem.variables, protected, strict=True)
    ]
    return problem.propose(", ".join(parts), problem.by_share(each), orders)


def _by_importance(problem: SearchProblem, orders: Orders) -> list[Proposal]:
    """Plans in which importance decides how much each module loses: its own, or that of its units."""
    shares = module_shares(problem.variables, problem.scores, attention=0.3)
    return [problem.propose("module importance", problem.by_share(shares), orders), importance(problem)]


def _moves(problem: SearchProblem) -> list[_Shares]:
    """Moves in the order in which they are tried, each as long as it improves the plan."""
    step = max(1, round(END_STEP * len(problem.graph.blocks)))
    ends = [_Shares(0, 0, step), _Shares(0, step, 0), _Shares(0, 0, -step), _Shares(0, -step, 0)]
    return [*([_Shares(ATTENTION_STEP, 0, 0)] if _of_both(problem) else []), *(ends if problem.protects_ends else [])]


def _allowed(shares: _Shares, problem: SearchProblem) -> bool:
    protected = shares.first + shares.last
    return shares.attention <= 1 and min(shares) >= 0 and protected <= MOST_PROTECTED * len(problem.graph.blocks)


def _of_both(problem: SearchProblem) -> bool:
    """Whether there are attention modules and others."""
    return len({variable.of_heads for variable in problem.variables}) == 2
