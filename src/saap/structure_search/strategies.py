"""Strategies: from a search problem to sizes of modules and an order of their units.

SAAP states the idea of stability, not its formulas: units whose importance fluctuates most over samples are unstable.
The two indicators below are our readings of it. The default strategy chooses among the others by measured loss.
"""

import dataclasses
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from saap.core.records import Candidate, FloatArray, IntArray, UnitScores
from saap.structure_search.problem import (
    DecisionVariable,
    Decrement,
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
MORE_LAST_SHARES = (4 / 30, 6 / 30, 8 / 30, 10 / 30)
"""Shares of the last blocks that a search before a reconstruction tries to protect instead."""
TOLERATED = 1.04
"""By how much more of those may increase the loss over LAST_SHARE's.

Whole blocks at the end are reconstructed too, and correct errors of earlier ones, which masked losses do not show.
"""
WAVES = 4
MUTATION_SCALE = 0.3
CLEARLY_BETTER = 0.95
"""Share of the first start's loss that a candidate must be below.

Smaller differences on so few held-out tokens are noise: SmolLM2 without 30 % of its blocks, 4 % better there, had 1.36
times the perplexity on other text. And a reconstruction recovers more of the loss of removed FFN channels than of
attention heads, which masked losses do not show.
"""
LEAST_SHARE = 0.02
"""What a module that loses nothing counts as losing, so that the evolution can remove something from it."""


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


def adaptive(problem: SearchProblem) -> Proposal:
    """The candidate with the least measured loss, with the trail of all that were measured.

    The first start is kept unless that loss is clearly less than its own; before a reconstruction, the uniform start
    with the most of the last blocks protected that does not lose much more. The starts come first, one for each order
    of units; then, in the order of the best of them, the named candidates and an evolution from the best candidate, in
    which a child that is better becomes the parent.
    """
    guide, ranking = problem.guide, _ranking(problem)
    starts, evaluator = _starts(problem, ranking), guide.evaluator
    if evaluator is None or guide.evaluations < 2:
        return starts[0]
    measured: list[tuple[float, Proposal]] = []

    def measure(proposal: Proposal) -> float | None:
        """Its loss; None if it is known already, or no evaluation is left."""
        known = any(one.orders is proposal.orders and one.sizes == proposal.sizes for _, one in measured)
        if known or len(measured) >= guide.evaluations:
            return None
        loss = evaluator(proposal.keep(problem.variables), problem.dropped)
        measured.append((loss, proposal))
        guide.progress(len(measured), guide.evaluations)
        return loss

    for start in starts:
        measure(start)
    first_loss, first = measured[0]
    kept = first if ranking is not None else _more_protected(problem, first, first_loss, measure)
    orders = min(measured, key=itemgetter(0))[1].orders
    for proposal in _named(problem, orders):
        measure(proposal)
    best_loss, best = min(measured, key=itemgetter(0))
    pairs = zip(problem.variables, best.sizes, strict=True)
    shares = [max((variable.units - size) / variable.units, LEAST_SHARE) for variable, size in pairs]
    decrements = ranking if ranking is not None and best is starts[0] else problem.by_share(shares)
    generator, parent, failures = np.random.default_rng(guide.seed), np.zeros(WAVES + 1), 0
    while len(measured) < guide.evaluations and failures < 20:
        genes = parent + generator.normal(0, MUTATION_SCALE, WAVES + 1)
        child = problem.propose(f"evolution {len(measured)}", _mutated(problem, decrements, genes), orders)
        loss = measure(child)
        if loss is None:
            failures += 1
        elif loss < best_loss:
            best_loss, best, parent = loss, child, genes
    if best_loss > CLEARLY_BETTER * first_loss:
        best = kept
    order = sorted(measured, key=lambda one: (one[1] is not best, one[0]))
    trail = (Candidate(name=proposal.name, loss=loss) for loss, proposal in order)
    return dataclasses.replace(best, trail=tuple(trail))


def protected_layers(blocks: int, *, first: float = FIRST_SHARE, last: float = LAST_SHARE) -> tuple[int, ...]:
    """Layers at both ends that lose least, by default or by these shares of all blocks."""
    start, end = round(first * blocks), blocks - round(last * blocks)
    return tuple(layer for layer in range(blocks) if layer < start or layer >= end)


def uniform_shares(problem: SearchProblem, *, attention: float, last: float = LAST_SHARE) -> list[float]:
    """Share of each variable under the uniform rule: 1, `attention` for attention modules, 0 at protected layers.

    last: share of the blocks at the end that are protected.
    """
    protected = set(protected_layers(len(problem.graph.blocks), last=last)) if problem.protects_ends else set[int]()
    return [
        0.0 if all(group.layer in protected for group in one.groups) else attention if one.of_heads else 1.0
        for one in problem.variables
    ]


def _ranking(problem: SearchProblem) -> list[Decrement] | None:
    """Decrements of all variables by second-order cost per parameter, where that is known for all of them."""
    costs = problem.guide.costs
    groups = [group.name for variable in problem.variables for group in variable.groups]
    if costs is None or any(name not in costs.orders for name in groups):
        return None
    return problem.by_score(lambda name: costs.scores[name][costs.orders[name]])


def _starts(problem: SearchProblem, ranking: Sequence[Decrement] | None) -> list[Proposal]:
    """The most promising first: one global ranking by second-order cost; then FFN alone, both ends protected."""
    starts, guide = [], problem.guide
    if ranking is not None and guide.costs is not None:
        starts.append(problem.propose("second-order cost", ranking, {**guide.costs.orders}))
    name, decrements = "uniform, ends protected", _uniform_start(problem, LAST_SHARE)
    return [*starts, problem.propose(name, decrements, importance_order(problem.scores))]


def _more_protected(
    problem: SearchProblem, kept: Proposal, first_loss: float, measure: Callable[[Proposal], float | None]
) -> Proposal:
    """The uniform start that protects the most of the last blocks at a tolerated loss; `kept` if no other does."""
    for last in MORE_LAST_SHARES if problem.guide.restores else ():
        name = f"uniform, last {round(last * len(problem.graph.blocks))} protected"
        start = problem.propose(name, _uniform_start(problem, last), kept.orders)
        loss = measure(start)
        if loss is None:
            continue
        if loss > TOLERATED * first_loss:
            break
        kept = start
    return kept


def _uniform_start(problem: SearchProblem, last: float) -> list[Decrement]:
    """FFN alone, where there is any."""
    only_attention = all(variable.of_heads for variable in problem.variables)
    return problem.by_share(uniform_shares(problem, attention=1.0 if only_attention else 0.0, last=last))


def _named(problem: SearchProblem, orders: Orders) -> list[Proposal]:
    """Uniform plans with shares of attention, module importance, the literal readings.

    orders: of the units in the plans that only say how much each module loses.
    """
    variables = problem.variables
    portions = (0.0, 1.0) if any(variable.of_heads for variable in variables) else (1.0,)
    shares = {
        f"uniform, attention {portion:g}, ends protected": uniform_shares(problem, attention=portion)
        for portion in portions
    }
    shares[f"module importance, spread {SPREAD:g}"] = module_shares(variables, problem.scores, attention=0.3)
    return [
        *(problem.propose(name, problem.by_share(each), orders) for name, each in shares.items()),
        *(strategy(problem) for strategy in (importance, volatility_z, volatility_cv)),
    ]


def _mutated(problem: SearchProblem, decrements: Sequence[Decrement], genes: np.ndarray[Any, Any]) -> list[Decrement]:
    """The same decrements at other costs: a factor for attention, and one that varies slowly over the depth.

    genes: (1 + WAVES,) logarithms; a gene of a wave is the amplitude of a cosine over the depth of the model.
    """
    depth = max(1, len(problem.graph.blocks))
    factors = []
    for variable in problem.variables:
        place = (np.mean([group.layer for group in variable.groups]) + 0.5) / depth
        waves = sum(gene * np.cos(np.pi * (index + 1) * place) for index, gene in enumerate(genes[1:]))
        factors.append(float(np.exp(waves + (genes[0] if variable.of_heads else 0.0))))
    return [dataclasses.replace(one, cost=one.cost * factors[one.variable]) for one in decrements]
