"""The stage: scores, graph and budget in, structure plan out."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saap.core.errors import PlanError, TargetError
from saap.core.records import Candidate, Layout, ModelGraph, Role, StructurePlan, UnitScores, count_parameters
from saap.core.storage import PlanDocument
from saap.models.structure.keep_index import KeepIndex, Kept, require_possible
from saap.settings.prune import PrunableRole, SkipLayers, unit_roles
from saap.settings.registry import Strategy
from saap.structure_search.budget import AnyBudget
from saap.structure_search.problem import (
    Evaluator,
    Proposal,
    Scores,
    SearchGuide,
    SearchProblem,
    build_variables,
    importance_order,
    required_step,
)
from saap.structure_search.strategies import protected_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """What may change, and how. skip_layers None: the search decides about the ends.

    legal_sizes: by role, the only sizes that may be chosen besides the dense one; None: all.
    """

    roles: tuple[PrunableRole, ...]
    layout: Layout
    align: int
    skip_layers: SkipLayers | None = None
    legal_sizes: Mapping[Role, Collection[int]] | None = None

    def skipped(self, graph: ModelGraph) -> tuple[int, ...]:
        """The layers that lose nothing on request."""
        return () if self.skip_layers is None else self.skip_layers.layers(len(graph.blocks))


def check_reachable(graph: ModelGraph, budget: AnyBudget, space: SearchSpace) -> StructurePlan:
    """A plan that meets the budget, made without scores. Raises TargetError if there is none."""
    flat = {group.name: UnitScores(mean=np.ones(group.units), variance=np.zeros(group.units)) for group in graph.groups}
    return search(graph, flat, budget, space, Strategy.UNIFORM)


def search(
    graph: ModelGraph, scores: Scores, budget: AnyBudget, space: SearchSpace, strategy: Strategy,
    guide: SearchGuide | None = None,
) -> StructurePlan:  # fmt: skip
    """Decide how many units each module keeps, and which.

    guide: for strategies that measure, and its evaluator, called once per block, for the role `block`.
    Raises TargetError if the budget cannot be reached.
    """
    guide = guide or SearchGuide()
    dropped = _blocks_to_drop(graph, scores, budget, space, guide.evaluator)
    remaining = dataclasses.replace(budget, removal=budget.removal - budget.removed(graph, {}, dropped))
    keep: dict[str, tuple[int, ...]] = {}
    trail: tuple[Candidate, ...] = ()
    protects = strategy is not Strategy.ADAPTIVE and space.skip_layers is None and space.layout is Layout.ADAPTIVE

    def solved(skipped: Collection[int]) -> tuple[dict[str, tuple[int, ...]], tuple[Candidate, ...]]:
        variables = build_variables(
            graph, roles=unit_roles(space.roles), layout=space.layout, align=space.align,
            skipped_layers={*dropped, *skipped}, legal_sizes=space.legal_sizes,
        )  # fmt: skip
        proposal: Proposal = strategy.load()(SearchProblem(graph, variables, scores, remaining, dropped, guide))
        return proposal.keep(variables), proposal.trail

    while remaining.removal > 0:
        try:  # both ends are protected by default, unless the budget cannot be met so
            keep, trail = solved(protected_layers(len(graph.blocks)) if protects else space.skipped(graph))
        except TargetError:
            if not protects:
                raise
            keep, trail = solved(())
        # Channels of the whole model also lie in the blocks that are dropped: request what was counted twice.
        missing = max(0, budget.removal - budget.removed(graph, keep, dropped))
        remaining = dataclasses.replace(remaining, removal=remaining.removal + missing if missing else 0)
    return make_plan(graph, keep, dropped, layout=space.layout, strategy=strategy, align=space.align, trail=trail)


def make_plan(
    graph: ModelGraph, keep: Mapping[str, tuple[int, ...]], dropped_blocks: Sequence[int], *, layout: Layout,
    strategy: str, align: int, trail: tuple[Candidate, ...] = (),
) -> StructurePlan:  # fmt: skip
    """A plan with its predicted numbers of parameters; groups that keep all their units need not be named."""
    units = {group.name: group.units for group in graph.groups}
    keep = {name: kept for name, kept in keep.items() if len(kept) < units[name]}
    shapes = KeepIndex.of(graph, keep, dropped_blocks).shapes
    return StructurePlan(
        graph_digest=graph.digest, layout=layout, strategy=str(strategy), align=align, keep=keep,
        dropped_blocks=tuple(dropped_blocks), parameters=count_parameters(shapes),
        block_parameters=count_parameters(graph.in_blocks(shapes)), trail=trail,
    )  # fmt: skip


def complete_plan(graph: ModelGraph, given: PlanDocument) -> StructurePlan:
    """The plan of a file that lists all kept units. Raises PlanError if it gives the number alone of some."""
    keep = given.keep(graph)
    left_open = [name for name, kept in keep.items() if isinstance(kept, int)]
    if left_open:
        raise PlanError(f"The units of {left_open[0]} are still to be chosen", "List them as `units`")
    chosen = {name: kept for name, kept in keep.items() if not isinstance(kept, int)}
    return make_plan(
        graph, chosen, given.dropped_blocks, layout=given.layout, strategy=given.strategy, align=given.align,
        trail=tuple(Candidate(name=one.name, loss=math.inf if one.loss is None else one.loss) for one in given.trail),
    )  # fmt: skip


def plan_from_counts(
    graph: ModelGraph, scores: Scores, keep: Mapping[str, Kept], dropped_blocks: Sequence[int], *, layout: Layout,
    align: int,
) -> StructurePlan:  # fmt: skip
    """A plan that a person edited. keep: units by group, or a number of units that the scores' order fills.

    Raises PlanError where the model cannot lose what the plan leaves out.
    """
    orders, groups = importance_order(scores), {group.name: group for group in graph.groups}
    chosen: dict[str, tuple[int, ...]] = {}
    for name, kept in keep.items():
        if isinstance(kept, int):
            order = orders[name][::-1] if name in orders else np.arange(groups[name].units if name in groups else 0)
            kept = order[:kept].tolist()
        chosen[name] = tuple(sorted(kept))
    require_possible(graph, chosen, dropped_blocks)
    for name, kept in chosen.items():
        count, step, units = keep[name], required_step(graph, groups[name]), groups[name].units
        if isinstance(count, int) and count != len(kept):
            raise PlanError(f"The plan keeps {count} units of {name}, which has {units}", "Keep no more of them")
        if len(kept) < units and len(kept) % step:
            raise PlanError(
                f"The plan keeps {len(kept)} units of {name}, whose matrices are stacked", f"Keep a multiple of {step}"
            )
    return make_plan(graph, chosen, dropped_blocks, layout=layout, strategy="edited plan", align=align)


def _blocks_to_drop(
    graph: ModelGraph, scores: Scores, budget: AnyBudget, space: SearchSpace, evaluator: Evaluator | None
) -> tuple[int, ...]:
    """Whole blocks to drop: as many as fit into the budget, or, alone, until it is reached.

    Ordered by the measured loss of dropping each block alone, or by the mean importance of its units.
    Raises TargetError if even all blocks but one are not enough.
    """
    if PrunableRole.BLOCK not in space.roles:
        return ()
    eligible = [layer for layer in range(len(graph.blocks)) if layer not in space.skipped(graph)]

    def loss(layer: int) -> float:
        if evaluator is not None:
            return evaluator({}, (layer,))
        scored = [scores[group.name] for group in graph.in_block(layer) if group.name in scores]
        return float(np.mean([score.mean.mean() for score in scored]))

    alone = len(space.roles) == 1
    dropped: list[int] = []
    for layer in sorted(eligible, key=loss)[: len(graph.blocks) - 1]:
        if budget.removed(graph, {}, dropped) >= budget.removal:
            break
        if not alone and budget.removed(graph, {}, [*dropped, layer]) > budget.removal:
            break
        dropped.append(layer)
    removed = budget.removed(graph, {}, dropped)
    if alone and removed < budget.removal:
        raise budget.unreachable(graph, removed, "by dropping whole blocks")
    return tuple(sorted(dropped))
