"""The default strategy: free numbers are chosen by measured loss, the literal readings being among the candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saap.core.records import Candidate, ModelGraph
from saap.models.walk.backend import Progress, silent
from saap.settings.prune import Strategy
from saap.structure_search.allocation import Decrement, Orders, Proposal, Scores, SearchProblem
from saap.structure_search.costs import SecondOrder
from saap.structure_search.strategies import STRATEGIES, importance_order, module_shares
from saap.structure_search.variables import DecisionVariable

Evaluator = Callable[[Mapping[str, tuple[int, ...]], tuple[int, ...]], float]

# Protecting both ends was measured to beat every rule driven by importance (SmolLM2: first 4 and last 2 of 30 layers).
FIRST_SHARE, LAST_SHARE = 4 / 30, 2 / 30
ATTENTION_SHARES = (0.0, 1.0)
SPREAD = 0.3
WAVES = 4
MUTATION_SCALE = 0.3
LEAST_SHARE = 0.02
"""What a module that loses nothing counts as losing, so that the evolution can ask it for something."""


def protected_layers(blocks: int) -> tuple[int, ...]:
    """Layers at both ends that lose least by default."""
    first, last = round(FIRST_SHARE * blocks), round(LAST_SHARE * blocks)
    return tuple(layer for layer in range(blocks) if layer < first or layer >= blocks - last)


def uniform_shares(graph: ModelGraph, variables: Sequence[DecisionVariable], *, attention: float) -> list[float]:
    """Share of each variable under the uniform rule: 1, `attention` for attention modules, 0 at protected layers."""
    protected = set(protected_layers(len(graph.blocks)))
    return [
        0.0 if all(group.layer in protected for group in one.groups) else attention if one.of_heads else 1.0
        for one in variables
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchGuide:
    """What the adaptive strategy goes by, beyond the scores.

    element_scores: of the element-wise importance alone, whose order of units competes with that of the scores.
    costs: second-order costs, from which the best unmeasured proposal follows. evaluator: loss of a structure given its
    kept units and dropped blocks; None, or `evaluations` below 2, takes the first start unmeasured.
    """

    element_scores: Scores | None = None
    costs: SecondOrder | None = None
    evaluator: Evaluator | None = None
    evaluations: int = 0
    seed: int = 0
    progress: Progress = silent


def adaptive(problem: SearchProblem, guide: SearchGuide) -> tuple[Proposal, tuple[Candidate, ...]]:
    """The candidate with the least measured loss, and the trail of all that were measured, best first.

    The starts come first, one for each order of units; then, in the order of the best of them, the named candidates and
    an evolution from the best candidate, in which a child that is better becomes the parent.
    """
    ranking = _ranking(problem, guide.costs)
    starts = _starts(problem, guide, ranking)
    evaluator, evaluations = guide.evaluator, guide.evaluations
    if evaluator is None or evaluations < 2:
        return starts[0], ()
    measured: list[tuple[float, Proposal]] = []

    def measure(proposal: Proposal) -> float:
        loss = evaluator(proposal.keep(problem.variables), problem.dropped)
        measured.append((loss, proposal))
        guide.progress(len(measured), evaluations)
        return loss

    for start in starts[:evaluations]:
        measure(start)
    orders = min(measured, key=lambda pair: pair[0])[1].orders
    for proposal in _named(problem, orders):
        if len(measured) < evaluations and not _repeats(proposal, measured):
            measure(proposal)
    best_loss, best = min(measured, key=lambda pair: pair[0])
    decrements = ranking if ranking is not None and best is starts[0] else problem.by_share(_shares(problem, best))
    generator, parent, failures = np.random.default_rng(guide.seed), np.zeros(WAVES + 1), 0
    while len(measured) < evaluations and failures < 20:
        genes = parent + generator.normal(0, MUTATION_SCALE, WAVES + 1)
        child = problem.propose(f"evolution {len(measured)}", _mutated(problem, decrements, genes), orders)
        if _repeats(child, measured):
            failures += 1
            continue
        loss = measure(child)
        if loss < best_loss:
            best_loss, best, parent = loss, child, genes
    trail = sorted((Candidate(name=proposal.name, loss=loss) for loss, proposal in measured), key=lambda c: c.loss)
    return best, tuple(trail)


def _repeats(proposal: Proposal, measured: Sequence[tuple[float, Proposal]]) -> bool:
    return any(one.orders is proposal.orders and one.sizes == proposal.sizes for _, one in measured)


def _ranking(problem: SearchProblem, costs: SecondOrder | None) -> list[Decrement] | None:
    """Decrements of all variables by second-order cost per parameter, where that is known for all of them."""
    groups = [group.name for variable in problem.variables for group in variable.groups]
    if costs is None or any(name not in costs.orders for name in groups):
        return None
    return problem.by_score(lambda name: costs.scores[name].mean[costs.orders[name]])


def _starts(problem: SearchProblem, guide: SearchGuide, ranking: Sequence[Decrement] | None) -> list[Proposal]:
    """The most promising first: one global ranking by second-order cost; the element-wise order; that of the scores.

    The others take FFN first and protect both ends.
    """
    starts = []
    if ranking is not None and guide.costs is not None:
        starts.append(problem.propose("second-order cost", ranking, {**guide.costs.orders}))
    only_attention = all(variable.of_heads for variable in problem.variables)
    shares = uniform_shares(problem.graph, problem.variables, attention=1.0 if only_attention else 0.0)
    name, decrements = "uniform, ends spared", problem.by_share(shares)
    if guide.element_scores is not None:
        orders = importance_order(guide.element_scores)
        starts.append(problem.propose(f"{name}, element-wise order", decrements, orders))
    return [*starts, problem.propose(name, decrements, importance_order(problem.scores))]


def _named(problem: SearchProblem, orders: Orders) -> list[Proposal]:
    """Uniform plans with shares of attention, module importance, the literal readings.

    orders: of the units in the plans that only say how much each module loses.
    """
    has_attention = any(variable.of_heads for variable in problem.variables)
    shares = {
        f"uniform, attention {attention:g}, ends spared": uniform_shares(
            problem.graph, problem.variables, attention=attention
        )
        for attention in (ATTENTION_SHARES if has_attention else (1.0,))
    }
    by_module = module_shares(problem.variables, problem.scores, spread=SPREAD, attention=0.3)
    shares[f"module importance, spread {SPREAD:g}"] = by_module
    literal = (Strategy.IMPORTANCE, Strategy.VOLATILITY_Z, Strategy.VOLATILITY_CV)
    return [
        *(problem.propose(name, problem.by_share(each), orders) for name, each in shares.items()),
        *(STRATEGIES[strategy](problem) for strategy in literal),
    ]


def _shares(problem: SearchProblem, best: Proposal) -> list[float]:
    """What each variable loses under a proposal, at least a little."""
    each = zip(problem.variables, best.sizes, strict=True)
    return [max((variable.units - size) / variable.units, LEAST_SHARE) for variable, size in each]


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
