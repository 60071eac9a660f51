"""The stage: scores, graph and budget in, structure plan out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from saap.core.errors import PlanError, TargetError
from saap.core.records import (
    Candidate,
    Layout,
    ModelGraph,
    Role,
    StructurePlan,
    UnitScores,
    count_parameters,
)
from saap.core.storage import PlanFile
from saap.models.structure.keep_index import KeepIndex, require_possible
from saap.settings.prune import PrunableRole, SkipLayers, Strategy, unit_roles
from saap.structure_search.adaptive import adaptive, spared_ends
from saap.structure_search.allocation import AnyBudget
from saap.structure_search.costs import SecondOrder
from saap.structure_search.slots import Slot, build_slots, required_step
from saap.structure_search.strategies import STRATEGIES, Proposal, importance_order

Scores = Mapping[str, UnitScores]
Judge = Callable[[Mapping[str, tuple[int, ...]], tuple[int, ...]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """What may change, and how. skip_layers None: the search decides about the ends.

    legal_sizes: by role, the only sizes that may be chosen beside the dense one; None: all.
    """

    roles: tuple[PrunableRole, ...]
    layout: Layout
    align: int
    skip_layers: SkipLayers | None = None
    legal_sizes: Mapping[Role, Collection[int]] | None = None


def check_reachable(graph: ModelGraph, budget: AnyBudget, space: SearchSpace) -> StructurePlan:
    """A plan that meets the budget, made without scores. Raises TargetError if there is none."""
    flat = {group.name: UnitScores(mean=np.ones(group.units), variance=np.zeros(group.units)) for group in graph.groups}
    return search(graph, flat, budget, space, Strategy.UNIFORM)


def search(
    graph: ModelGraph,
    scores: Scores,
    budget: AnyBudget,
    space: SearchSpace,
    strategy: Strategy,
    *,
    element_scores: Scores | None = None,
    costs: SecondOrder | None = None,
    judge: Judge | None = None,
    evaluations: int = 0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> StructurePlan:
    """Decide how much each module gives and which units go.

    element_scores (of the element-wise importance alone) and costs (second-order): for the adaptive strategy. judge:
    measured loss of (kept units, dropped blocks); only the adaptive strategy and the role `block` ask it,
    `evaluations` times at most for the former, once per block for the latter.
    Raises TargetError if the budget cannot be reached.
    """
    dropped = _blocks_to_drop(graph, scores, budget, space, judge)
    left = dataclasses.replace(budget, removal=budget.removal - budget.removed(graph, {}, dropped))
    keep: dict[str, tuple[int, ...]] = {}
    trail: tuple[Candidate, ...] = ()
    while left.removal > 0:
        if strategy is Strategy.ADAPTIVE:
            slots = _slots(graph, space, dropped, spare=False)
            proposal, trail = adaptive(
                graph,
                slots,
                scores,
                left,
                element_scores=element_scores,
                costs=costs,
                judge=None if judge is None else partial(_judged, judge, dropped),
                evaluations=evaluations,
                seed=seed,
                progress=progress,
            )
        else:
            slots, proposal = _single(graph, scores, left, space, strategy, dropped)
        keep = proposal.keep(slots)
        missing = budget.removal - budget.removed(graph, keep, dropped)
        if missing <= 0:
            break
        # Channels of the whole model also lie in the blocks that are dropped: ask for what was counted twice.
        left = dataclasses.replace(left, removal=left.removal + missing)
    return make_plan(graph, keep, dropped, layout=space.layout, strategy=strategy, align=space.align, trail=trail)


def _judged(judge: Judge, dropped: tuple[int, ...], keep: Mapping[str, tuple[int, ...]]) -> float:
    return judge(keep, dropped)


def make_plan(
    graph: ModelGraph,
    keep: Mapping[str, tuple[int, ...]],
    dropped_blocks: Sequence[int],
    *,
    layout: Layout,
    strategy: str,
    align: int,
    trail: tuple[Candidate, ...] = (),
) -> StructurePlan:
    """A plan with its predicted numbers of parameters; groups that keep all their units need not be named."""
    units = {group.name: group.units for group in graph.groups}
    keep = {name: kept for name, kept in keep.items() if len(kept) < units[name]}
    shapes = KeepIndex.of(graph, keep, dropped_blocks).shapes
    return StructurePlan(
        graph_digest=graph.digest,
        layout=layout,
        strategy=str(strategy),
        align=align,
        keep=keep,
        dropped_blocks=tuple(dropped_blocks),
        parameters=count_parameters(shapes),
        block_parameters=count_parameters(graph.in_blocks(shapes)),
        trail=trail,
    )


def with_units(graph: ModelGraph, plan: StructurePlan, keep: Mapping[str, tuple[int, ...]]) -> StructurePlan:
    """The plan with other units of the same groups, where `keep` names them."""
    chosen = {name: keep.get(name, kept) for name, kept in plan.keep.items()}
    return make_plan(
        graph, chosen, plan.dropped_blocks, layout=plan.layout, strategy=plan.strategy, align=plan.align,
        trail=plan.trail,
    )  # fmt: skip


def complete_plan(graph: ModelGraph, given: PlanFile) -> StructurePlan:
    """The plan of a file that lists all kept units. Raises PlanError if it gives the number alone of some."""
    keep: dict[str, tuple[int, ...]] = {}
    for name, kept in given.keep.items():
        if isinstance(kept, int):
            raise PlanError(f"The units of {name} are still to be chosen", "List them as `units`")
        keep[name] = kept
    return make_plan(
        graph, keep, given.dropped_blocks, layout=given.layout, strategy=given.strategy, align=given.align,
        trail=given.trail,
    )  # fmt: skip


def plan_from_counts(graph: ModelGraph, scores: Scores, given: PlanFile) -> StructurePlan:
    """A plan that a person edited: kept units as they are, or a number of units that the scores' order fills.

    Raises PlanError where the model cannot lose what the plan leaves out.
    """
    orders = importance_order(scores)
    units = {group.name: group.units for group in graph.groups}
    chosen: dict[str, tuple[int, ...]] = {}
    for name, kept in given.keep.items():
        if isinstance(kept, int):
            order = orders[name] if name in orders else np.arange(units.get(name, 0))[::-1]
            kept = order[::-1][:kept].tolist()
        chosen[name] = tuple(sorted(kept))
    require_possible(graph, chosen, given.dropped_blocks)
    for name, kept in chosen.items():
        count, step = given.keep[name], required_step(graph, graph.group(name))
        if isinstance(count, int) and count != len(kept):
            raise PlanError(f"The plan keeps {count} units of {name}, which has {units[name]}", "Keep no more of them")
        if len(kept) < units[name] and len(kept) % step:
            raise PlanError(
                f"The plan keeps {len(kept)} units of {name}, whose matrices are stacked", f"Keep a multiple of {step}"
            )
    return make_plan(
        graph, chosen, given.dropped_blocks, layout=given.layout, strategy="edited plan", align=given.align
    )


def _slots(graph: ModelGraph, space: SearchSpace, dropped: Sequence[int], *, spare: bool) -> tuple[Slot, ...]:
    skipped = set(dropped)
    if space.skip_layers is not None:
        skipped |= set(space.skip_layers.layers(len(graph.blocks)))
    elif spare and space.layout is Layout.ADAPTIVE:
        skipped |= set(spared_ends(len(graph.blocks)))
    return build_slots(
        graph,
        roles=unit_roles(space.roles),
        layout=space.layout,
        align=space.align,
        skipped_layers=skipped,
        legal_sizes=space.legal_sizes,
    )


def _single(
    graph: ModelGraph, scores: Scores, budget: AnyBudget, space: SearchSpace, strategy: Strategy, dropped: Sequence[int]
) -> tuple[tuple[Slot, ...], Proposal]:
    """One strategy's proposal; where the ends are spared by default and it cannot be reached so, without sparing."""
    slots = _slots(graph, space, dropped, spare=True)
    try:
        return slots, STRATEGIES[strategy](graph, slots, scores, budget)
    except TargetError:
        if space.skip_layers is not None:
            raise
        slots = _slots(graph, space, dropped, spare=False)
        return slots, STRATEGIES[strategy](graph, slots, scores, budget)


def _blocks_to_drop(
    graph: ModelGraph, scores: Scores, budget: AnyBudget, space: SearchSpace, judge: Judge | None
) -> tuple[int, ...]:
    """Whole blocks that leave: as many as fit into the budget, or, alone, until it is reached.

    Ordered by the measured loss of dropping each block alone, or by the mean importance of its units.
    Raises TargetError if even all blocks but one are not enough.
    """
    if PrunableRole.BLOCK not in space.roles:
        return ()
    skipped = set() if space.skip_layers is None else set(space.skip_layers.layers(len(graph.blocks)))
    eligible = [layer for layer in range(len(graph.blocks)) if layer not in skipped]
    losses = {layer: _block_loss(graph, scores, layer, judge) for layer in eligible}
    alone = len(space.roles) == 1
    dropped: list[int] = []
    for layer in sorted(eligible, key=lambda layer: losses[layer])[: len(graph.blocks) - 1]:
        if budget.removed(graph, {}, dropped) >= budget.removal:
            break
        if not alone and budget.removed(graph, {}, [*dropped, layer]) > budget.removal:
            break
        dropped.append(layer)
    removed = budget.removed(graph, {}, dropped)
    if alone and removed < budget.removal:
        raise budget.unreachable(graph, removed, "by dropping whole blocks")
    return tuple(sorted(dropped))


def _block_loss(graph: ModelGraph, scores: Scores, layer: int, judge: Judge | None) -> float:
    if judge is not None:
        return judge({}, (layer,))
    return float(np.mean([scores[group.name].mean.mean() for group in graph.in_block(layer) if group.name in scores]))
