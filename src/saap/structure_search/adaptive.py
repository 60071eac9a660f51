"""The default strategy: free numbers are chosen by measured loss, the literal readings being among the candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from saap.core.records import Candidate, IntArray, ModelGraph
from saap.settings.prune import Strategy
from saap.structure_search.allocation import AnyBudget, Step, steps_by_score, steps_by_share, take_steps
from saap.structure_search.costs import SecondOrder
from saap.structure_search.slots import Slot
from saap.structure_search.strategies import STRATEGIES, Proposal, Scores, importance_order, module_shares

Evaluator = Callable[[Mapping[str, tuple[int, ...]]], float]

# Sparing both ends was measured to beat every rule driven by importance (SmolLM2: first 4 and last 2 of 30 layers).
FIRST_SHARE, LAST_SHARE = 4 / 30, 2 / 30
ATTENTION_SHARES = (0.0, 1.0)
SPREADS = (0.3,)
WAVES = 4
MUTATION_SCALE = 0.3


def spared_ends(blocks: int) -> tuple[int, ...]:
    """Layers at both ends that give least by default."""
    first, last = round(FIRST_SHARE * blocks), round(LAST_SHARE * blocks)
    return tuple(layer for layer in range(blocks) if layer < first or layer >= blocks - last)


def uniform_shares(graph: ModelGraph, slots: Sequence[Slot], *, attention: float, spare: bool) -> list[float]:
    """Share of each slot under the uniform rule: 1, `attention` for attention modules, 0 at spared ends."""
    spared = set(spared_ends(len(graph.blocks))) if spare else set()
    return [
        0.0 if all(group.layer in spared for group in slot.groups) else attention if slot.of_heads else 1.0
        for slot in slots
    ]


def default_proposal(
    graph: ModelGraph, slots: Sequence[Slot], scores: Scores, budget: AnyBudget, *, name: str = "uniform, ends spared"
) -> Proposal:
    """The start of the search, and its whole answer where nothing may be measured: FFN first, both ends spared."""
    only_attention = all(slot.of_heads for slot in slots)
    shares = uniform_shares(graph, slots, attention=1.0 if only_attention else 0.0, spare=True)
    return _by_shares(name, graph, slots, budget, shares, importance_order(scores))


def adaptive(
    graph: ModelGraph,
    slots: Sequence[Slot],
    scores: Scores,
    budget: AnyBudget,
    *,
    element_scores: Scores | None,
    costs: SecondOrder | None,
    evaluator: Evaluator | None,
    evaluations: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Proposal, tuple[Candidate, ...]]:
    """The candidate with the least measured loss, and the trail of all that were measured, best first.

    element_scores: of the element-wise importance alone, whose order of units competes with that of `scores`.
    costs: second-order costs, from which the best unmeasured proposal follows. evaluator: loss of a structure given its
    kept units; None, or `evaluations` below 2, takes the first start unmeasured.
    The starts come first, one for each order of units; then, in the order of the best of them, the named candidates and
    an evolution from the best candidate, in which a child that is better becomes the parent.
    """
    ranking = _ranking(slots, costs)
    starts = _starts(graph, slots, scores, budget, element_scores, costs, ranking)
    if evaluator is None or evaluations < 2:
        return starts[0], ()
    measured: list[tuple[float, Proposal]] = []

    def measure(proposal: Proposal) -> float:
        loss = evaluator(proposal.keep(slots))
        measured.append((loss, proposal))
        if progress is not None:
            progress(len(measured), evaluations)
        return loss

    for start in starts[:evaluations]:
        measure(start)
    orders = min(measured, key=lambda pair: pair[0])[1].orders
    for proposal in _named(graph, slots, scores, budget, orders):
        if len(measured) < evaluations and not _repeats(proposal, measured):
            measure(proposal)
    best_loss, best = min(measured, key=lambda pair: pair[0])
    steps = ranking if ranking is not None and best is starts[0] else steps_by_share(slots, _shares(slots, best.sizes))
    generator, parent, failures = np.random.default_rng(seed), np.zeros(WAVES + 1), 0
    while len(measured) < evaluations and failures < 20:
        genes = parent + generator.normal(0, MUTATION_SCALE, WAVES + 1)
        sizes = take_steps(graph, slots, _repriced(graph, slots, steps, genes), budget)
        child = Proposal(name=f"evolution {len(measured)}", sizes=sizes, orders=orders)
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


def _by_shares(
    name: str,
    graph: ModelGraph,
    slots: Sequence[Slot],
    budget: AnyBudget,
    shares: Sequence[float],
    orders: Mapping[str, IntArray],
) -> Proposal:
    sizes = take_steps(graph, slots, steps_by_share(slots, shares), budget)
    return Proposal(name=name, sizes=sizes, orders=orders)


def _ranking(slots: Sequence[Slot], costs: SecondOrder | None) -> list[Step] | None:
    """Steps of all slots priced by second-order cost per parameter, where that is known for all of them."""
    groups = [group.name for slot in slots for group in slot.groups]
    if costs is None or any(name not in costs.orders for name in groups):
        return None
    return steps_by_score(slots, lambda name: costs.scores[name].mean[costs.orders[name]])


def _starts(
    graph: ModelGraph,
    slots: Sequence[Slot],
    scores: Scores,
    budget: AnyBudget,
    element_scores: Scores | None,
    costs: SecondOrder | None,
    ranking: Sequence[Step] | None,
) -> list[Proposal]:
    """The most promising first: one global ranking by second-order cost; the element-wise order; that of the scores."""
    starts = []
    if ranking is not None and costs is not None:
        sizes = take_steps(graph, slots, ranking, budget)
        starts.append(Proposal(name="second-order cost", sizes=sizes, orders={**costs.orders}))
    if element_scores is not None:
        name = "uniform, ends spared, element-wise order"
        starts.append(default_proposal(graph, slots, element_scores, budget, name=name))
    return [*starts, default_proposal(graph, slots, scores, budget)]


def _named(
    graph: ModelGraph, slots: Sequence[Slot], scores: Scores, budget: AnyBudget, orders: Mapping[str, IntArray]
) -> list[Proposal]:
    """Uniform plans with shares of attention, module importance, the literal readings.

    orders: of the units in the plans that only say how much each module gives.
    """
    proposals = []
    has_attention = any(slot.of_heads for slot in slots)
    for attention in ATTENTION_SHARES if has_attention else (1.0,):
        shares = uniform_shares(graph, slots, attention=attention, spare=True)
        name = f"uniform, attention {attention:g}, ends spared"
        proposals.append(_by_shares(name, graph, slots, budget, shares, orders))
    for spread in SPREADS:
        shares = module_shares(slots, scores, spread=spread, attention=0.3)
        name = f"module importance, spread {spread:g}"
        proposals.append(_by_shares(name, graph, slots, budget, shares, orders))
    for strategy in (Strategy.IMPORTANCE, Strategy.VOLATILITY_Z, Strategy.VOLATILITY_CV):
        proposals.append(STRATEGIES[strategy](graph, slots, scores, budget))
    return proposals


def _shares(slots: Sequence[Slot], sizes: Sequence[int]) -> list[float]:
    """What each slot gives under a plan, with a little for those that give nothing, so that the evolution can ask."""
    return [max((slot.units - size) / slot.units, 0.02) for slot, size in zip(slots, sizes, strict=True)]


def _repriced(
    graph: ModelGraph, slots: Sequence[Slot], steps: Sequence[Step], genes: np.ndarray[Any, Any]
) -> list[Step]:
    """The same steps at other prices: a factor for attention, and one that varies slowly over the depth.

    genes: (1 + WAVES,) logarithms; a gene of a wave is the amplitude of a cosine over the depth of the model.
    """
    depth = max(1, len(graph.blocks))
    shifts = []
    for slot in slots:
        place = (np.mean([group.layer for group in slot.groups]) + 0.5) / depth
        waves = sum(gene * np.cos(np.pi * (index + 1) * place) for index, gene in enumerate(genes[1:]))
        shifts.append(float(np.exp(waves + (genes[0] if slot.of_heads else 0.0))))
    return [dataclasses.replace(step, price=step.price * shifts[step.slot]) for step in steps]
