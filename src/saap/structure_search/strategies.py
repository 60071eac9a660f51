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
END_STEP, MOST_PROTECTED = 2 / 30, 20 / 30
"""By how many of all blocks the search moves an end, and how many at most it protects."""
WAVES = 4
MUTATION_SCALE = 0.3
CLEARLY_BETTER = 0.9
"""Share of the best start's loss that a candidate of another kind must be below.

Smaller differences on so few held-out tokens say little of other text. SmolLM2 without 20 % of its blocks by one global
ranking lost 9 % less there than by equal shares, and had 1.19 times the perplexity on other text after a
reconstruction. And that recovers more of the loss of removed FFN channels than of attention heads, which masked losses
do not show.
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

    The starts come first, one for each order of units; then the first of them with other protected ends, if it is
    uniform. The best of these is kept unless another loses clearly less: in the order of the best, the named candidates
    and an evolution from the best candidate, in which a child that is better becomes the parent.
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
    kept_loss, kept = _with_better_ends(problem, starts, measured[0][0], measure)
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
    if best_loss > CLEARLY_BETTER * kept_loss:
        best = kept
    order = sorted(measured, key=lambda one: (one[1] is not best, one[0]))
    trail = (Candidate(name=proposal.name, loss=loss) for loss, proposal in order)
    return dataclasses.replace(best, trail=tuple(trail))


def default_ends(blocks: int) -> tuple[int, int]:
    """How many of the first and of the last blocks are protected by default."""
    return round(FIRST_SHARE * blocks), round(LAST_SHARE * blocks)


def protected_layers(blocks: int, ends: tuple[int, int] | None = None) -> tuple[int, ...]:
    """Layers at both ends that lose least: so many of the first and of the last, or the default."""
    first, last = ends if ends is not None else default_ends(blocks)
    return tuple(layer for layer in range(blocks) if layer < first or layer >= blocks - last)


def uniform_shares(problem: SearchProblem, *, attention: float, ends: tuple[int, int] | None = None) -> list[float]:
    """Share of each variable under the uniform rule: 1, `attention` for attention modules, 0 at protected layers."""
    protected = set(protected_layers(len(problem.graph.blocks), ends)) if problem.protects_ends else set[int]()
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
    name, decrements = "uniform, ends protected", _uniform_start(problem)
    return [*starts, problem.propose(name, decrements, importance_order(problem.scores))]


def _with_better_ends(
    problem: SearchProblem, starts: Sequence[Proposal], first_loss: float, measure: Callable[[Proposal], float | None]
) -> tuple[float, Proposal]:
    """The first start and its loss; a uniform one with its ends moved one step at a time as long as the loss falls."""
    blocks = len(problem.graph.blocks)
    ends, best_loss, best = default_ends(blocks), first_loss, starts[0]
    step = max(1, round(END_STEP * blocks))
    movable = len(starts) == 1 and problem.protects_ends
    for first, last in ((0, step), (step, 0), (0, -step), (-step, 0)) if movable else ():
        while True:
            moved = (ends[0] + first, ends[1] + last)
            if min(moved) < 0 or sum(moved) > MOST_PROTECTED * blocks:
                break
            name = f"uniform, first {moved[0]} and last {moved[1]} protected"
            proposal = problem.propose(name, _uniform_start(problem, moved), starts[0].orders)
            loss = measure(proposal)
            if loss is None or loss >= best_loss:
                break
            ends, best_loss, best = moved, loss, proposal
    return best_loss, best


def _uniform_start(problem: SearchProblem, ends: tuple[int, int] | None = None) -> list[Decrement]:
    """FFN alone, where there is any."""
    only_attention = all(variable.of_heads for variable in problem.variables)
    return problem.by_share(uniform_shares(problem, attention=1.0 if only_attention else 0.0, ends=ends))


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
