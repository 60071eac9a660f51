"""The stage: scores, graph and budget in, structure plan out."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saap.core.errors import ConfigurationError, PlanError, TargetError, listed
from saap.core.records import (
    Candidate,
    CoupledGroup,
    Layout,
    ModelGraph,
    Role,
    StructurePlan,
    UnitScores,
    count_parameters,
)
from saap.core.storage import PlanDocument
from saap.models.structure.keep_index import KeepIndex, require_possible
from saap.settings.prune import PrunableRole, SkipLayers, unit_roles
from saap.settings.registry import Strategy
from saap.structure_search.budget import AnyBudget, Budget
from saap.structure_search.problem import (
    DecisionVariable,
    Evaluator,
    Proposal,
    Scores,
    SearchGuide,
    SearchProblem,
    importance_order,
)
from saap.structure_search.strategies import protected_layers

# Fused products over stacked matrices (experts) want rows of whole 16 bytes: 8 numbers of two bytes.
STACKED_STEP = 8


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


def build_variables(
    graph: ModelGraph, space: SearchSpace, skipped_layers: Collection[int] = ()
) -> tuple[DecisionVariable, ...]:
    """What the search decides: one size for each module outside `skipped_layers`, or for several of them together.

    In the adaptive layout each module has a variable, as have the experts of one module together, whose matrices are
    stacked; in the uniform layout, which cannot skip layers, all modules of a role share one. FFN and hidden channels
    stay in multiples of the alignment; attention goes by whole KV groups. Raises TargetError if no group of a role can
    lose anything.
    """
    found: list[DecisionVariable] = []
    for role in unit_roles(space.roles):
        bundles: dict[str, list[CoupledGroup]] = {}
        for group in graph.of_role(role):
            if group.layer not in skipped_layers:
                shared = str(role) if space.layout is Layout.UNIFORM else group.bundle or group.name
                bundles.setdefault(shared, []).append(group)
        if not bundles and graph.of_role(role):
            raise TargetError(
                f"all blocks with {role} groups are skipped or dropped",
                "Skip fewer layers, or ask for a smaller reduction",
            )
        if not bundles:
            reason = next((refusal.reason for refusal in graph.refused if role.value in refusal.name), "none was found")
            raise TargetError(
                f"no {role} groups can be pruned in this model: {reason}", "Leave this role out of --roles"
            )
        found += [_variable(graph, groups, space) for groups in bundles.values()]
    return tuple(found)


def _variable(graph: ModelGraph, groups: Sequence[CoupledGroup], space: SearchSpace) -> DecisionVariable:
    first, role = groups[0], groups[0].role
    if len({group.units for group in groups}) > 1:
        raise TargetError(
            f"the {role} modules of this model differ in size, so one size for all does not exist",
            "Use --layout adaptive",
        )
    step = math.lcm(space.align, _required_step(graph, first)) if role.of_channels else 1
    sizes: Sequence[int] = range((first.units - 1) // step * step, max(0, first.least - 1), -step)
    if space.legal_sizes is not None:
        sizes = [size for size in sizes if size in space.legal_sizes.get(role, ())]
    return DecisionVariable(
        role=role, groups=tuple(groups), units=first.units, step=step, sizes=(first.units, *sizes),
        parameters_per_unit=sum(group.parameters_per_unit(graph.shapes) for group in groups),
    )  # fmt: skip


def _required_step(graph: ModelGraph, group: CoupledGroup) -> int:
    """Of what number kept units must be a multiple, whatever alignment is requested."""
    stacked = any(len(graph.shapes[member.tensor]) > 2 and member.axis for member in group.members)
    return STACKED_STEP if stacked else 1


def flat_scores(graph: ModelGraph) -> Mapping[str, UnitScores]:
    """Equal scores of all units, for what depends on sizes alone."""
    return {group.name: UnitScores(mean=np.ones(group.units), variance=np.zeros(group.units)) for group in graph.groups}


def check_reachable(graph: ModelGraph, budget: AnyBudget | None, space: SearchSpace) -> StructurePlan:
    """A plan that meets the budget, made without scores; None removes nothing. Raises TargetError if there is none."""
    alike = SearchGuide(evaluator=lambda keep, dropped: np.zeros(1))
    return search(graph, flat_scores(graph), budget or Budget(removal=0), space, Strategy.UNIFORM, alike)


def search(
    graph: ModelGraph, scores: Scores, budget: AnyBudget, space: SearchSpace, strategy: Strategy,
    guide: SearchGuide | None = None,
) -> StructurePlan:  # fmt: skip
    """Decide how many units each module keeps, and which.

    guide: for strategies that measure, and its evaluator, called once per block, for the role `block`.
    Raises TargetError if the budget cannot be reached, and ConfigurationError for roles or blocks without scores.
    """
    guide = guide or SearchGuide()
    if budget.removal > 0:
        _require_scores(graph, scores, space, blocks_measured=guide.evaluator is not None)
    dropped = _blocks_to_drop(graph, scores, budget, space, guide.evaluator)
    remaining = dataclasses.replace(budget, removal=budget.removal - budget.removed(graph, {}, dropped))
    keep: dict[str, tuple[int, ...]] = {}
    trail: tuple[Candidate, ...] = ()
    protects = not strategy.evaluates and space.skip_layers is None and space.layout is Layout.ADAPTIVE

    def solved(skipped: Collection[int]) -> tuple[dict[str, tuple[int, ...]], tuple[Candidate, ...]]:
        variables = build_variables(graph, space, {*dropped, *skipped})
        if _most_removed(graph, variables, budget, dropped) < budget.removal:
            raise _unreachable(graph, budget, space, dropped, skipped)
        proposal: Proposal = strategy.load()(
            SearchProblem(graph, variables, scores, remaining, dropped, guide, space.skip_layers is None)
        )
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


def _most_removed(
    graph: ModelGraph, variables: Sequence[DecisionVariable], budget: AnyBudget, dropped: Sequence[int]
) -> int:
    """What counts for the budget and is removed at the smallest sizes, dropped blocks included."""
    smallest = {group.name: variable.sizes[-1] for variable in variables for group in variable.groups}
    return budget.removed(graph, smallest, dropped)


def _unreachable(
    graph: ModelGraph, budget: AnyBudget, space: SearchSpace, dropped: Sequence[int], skipped: Collection[int]
) -> TargetError:
    """The refusal of a budget that the smallest sizes do not reach. Names the alignment if that alone prevents it."""
    reached, unaligned = (
        _most_removed(graph, build_variables(graph, one, {*dropped, *skipped}), budget, dropped)
        for one in (space, dataclasses.replace(space, align=1, legal_sizes=None))
    )
    allow = "a smaller --align" if unaligned >= budget.removal else "more roles or layers"
    return budget.unreachable(graph, reached, "with these roles, skipped layers and alignment", allow)


def _require_scores(graph: ModelGraph, scores: Scores, space: SearchSpace, *, blocks_measured: bool) -> None:
    """Raise ConfigurationError for requested roles, and blocks that are not measured, without any scores."""
    skipped = space.skipped(graph)
    found = [group for group in graph.groups if group.layer not in skipped]
    roles = [role for role in unit_roles(space.roles) if any(g.role is role and g.name not in scores for g in found)]
    if roles:
        missing = ", ".join(roles)
        raise ConfigurationError(f"There are no scores of the roles {missing}", "Estimate with these roles too")
    if PrunableRole.BLOCK in space.roles and not blocks_measured:
        layers = (layer for layer in range(len(graph.blocks)) if layer not in skipped)
        blocks = [layer for layer in layers if not any(group.name in scores for group in graph.in_block(layer))]
        if blocks:
            inside = dict.fromkeys(str(group.role) for group in found if group.layer in blocks)
            raise ConfigurationError(
                f"There are no scores of the blocks {listed([str(layer) for layer in blocks], 8)}",
                f"Estimate with the roles {', '.join(inside)} too" if inside else "Leave out the role block",
            )


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


def complete_plan(graph: ModelGraph, given: PlanDocument, scores: Scores | None = None) -> StructurePlan:
    """The plan of a file: one that saap wrote or, with the scores that choose units where it has only a number, edited.

    Raises PlanError where the model cannot lose what the plan leaves out, or units are still to be chosen.
    """
    orders, groups = importance_order(scores or {}), {group.name: group for group in graph.groups}
    chosen: dict[str, tuple[int, ...]] = {}
    for name, kept in given.keep(graph).items():
        if isinstance(kept, int):
            if scores is None:
                raise PlanError(f"The units of {name} are still to be chosen", "List them as `units`")
            order = orders[name][::-1] if name in orders else np.arange(groups[name].units)
            kept = order[:kept].tolist()
        chosen[name] = tuple(sorted(kept))
    require_possible(graph, chosen, given.dropped_blocks)
    for name, units in chosen.items():
        step = _required_step(graph, groups[name])
        if len(units) < groups[name].units and len(units) % step:
            raise PlanError(
                f"The plan keeps {len(units)} units of {name}, whose matrices are stacked", f"Keep a multiple of {step}"
            )
    edited = scores is not None
    trail = (Candidate(name=one.name, loss=math.inf if one.loss is None else one.loss) for one in given.trail)
    return make_plan(
        graph, chosen, given.dropped_blocks, layout=given.layout, strategy="edited plan" if edited else given.strategy,
        align=given.align, trail=() if edited else tuple(trail),
    )  # fmt: skip


def _blocks_to_drop(
    graph: ModelGraph, scores: Scores, budget: AnyBudget, space: SearchSpace, evaluator: Evaluator | None
) -> tuple[int, ...]:
    """Whole blocks to drop: as many as fit into the budget, or, alone, until it is reached.

    Ordered by the measured loss of dropping each block alone, or by the summed importance of its units. The sum is the
    estimate of that loss; a mean would depend on how finely a block is divided into units.
    Raises TargetError if even all blocks but one are not enough.
    """
    if PrunableRole.BLOCK not in space.roles:
        return ()
    eligible = [layer for layer in range(len(graph.blocks)) if layer not in space.skipped(graph)]

    def loss(layer: int) -> float:
        if evaluator is not None:
            return float(evaluator({}, (layer,)).mean())
        return float(sum(scores[group.name].mean.sum() for group in graph.in_block(layer) if group.name in scores))

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
