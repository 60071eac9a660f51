"""What the search may change: decision variables, each a number of units to keep.

In the adaptive layout each module has a variable, as have the experts of one module together, whose matrices are
stacked; in the uniform layout all modules of a role share one, since they share their size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from saap.core.errors import TargetError
from saap.core.records import CoupledGroup, Layout, ModelGraph, Role

# Fused products over stacked matrices (experts) want rows of whole 16 bytes: 8 numbers of two bytes.
STACKED_STEP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionVariable:
    """One size that the search sets for all `groups` together.

    units: of each group. sizes: the legal numbers of kept units, from all of them downwards; multiples of `step`
    after the first. parameters_per_unit: removed when every group loses one unit and nothing else is pruned.
    """

    name: str
    role: Role
    groups: tuple[CoupledGroup, ...]
    units: int
    step: int
    sizes: tuple[int, ...]
    parameters_per_unit: int

    @property
    def of_heads(self) -> bool:
        """Whether it is attention, by whole KV groups or by query heads."""
        return self.role in (Role.ATTENTION, Role.QUERY)


def build_variables(
    graph: ModelGraph,
    *,
    roles: Iterable[Role],
    layout: Layout,
    align: int,
    skipped_layers: Iterable[int] = (),
    legal_sizes: Mapping[Role, Collection[int]] | None = None,
) -> tuple[DecisionVariable, ...]:
    """Variables of the groups of `roles` outside `skipped_layers`.

    align: FFN and hidden channels stay in multiples of it (and of 8 where experts are stacked); attention goes by whole
    KV groups. The uniform layout cannot skip layers. legal_sizes: the only sizes that groups of a role may have beside
    their own.
    Raises TargetError if no group of a role can lose anything.
    """
    skipped = set(skipped_layers)
    found: list[DecisionVariable] = []
    for role in roles:
        groups = [group for group in graph.of_role(role) if group.layer not in skipped]
        if not groups:
            reason = next((refusal.reason for refusal in graph.refused if role.value in refusal.name), "none was found")
            raise TargetError(
                f"no {role} groups can be pruned in this model: {reason}", "Leave this role out of --roles"
            )
        bundles = [tuple(groups)] if layout is Layout.UNIFORM else _bundles(groups)
        legal = None if legal_sizes is None else legal_sizes.get(role, ())
        found += [_variable(graph, bundle, align, legal) for bundle in bundles]
    return tuple(found)


def required_step(graph: ModelGraph, group: CoupledGroup) -> int:
    """Of what number kept units must be a multiple, whatever alignment is requested."""
    stacked = any(len(graph.shapes[member.tensor]) > 2 and member.axis for member in group.members)
    return STACKED_STEP if stacked else 1


def _bundles(groups: Iterable[CoupledGroup]) -> list[tuple[CoupledGroup, ...]]:
    found: dict[str, list[CoupledGroup]] = {}
    for group in groups:
        found.setdefault(group.bundle or group.name, []).append(group)
    return [tuple(bundle) for bundle in found.values()]


def _variable(
    graph: ModelGraph, groups: tuple[CoupledGroup, ...], align: int, legal: Collection[int] | None
) -> DecisionVariable:
    first = groups[0]
    if len({group.units for group in groups}) > 1:
        raise TargetError(
            f"the {first.role} modules of this model differ in size, so one size for all does not exist",
            "Use --layout adaptive",
        )
    step = math.lcm(align, required_step(graph, first)) if first.role.of_channels else 1
    smaller = range((first.units - 1) // step * step, max(0, first.least - 1), -step)
    return DecisionVariable(
        name=(first.bundle or first.name) if len({group.layer for group in groups}) == 1 else str(first.role),
        role=first.role,
        groups=groups,
        units=first.units,
        step=step,
        sizes=(first.units, *(size for size in smaller if legal is None or size in legal)),
        parameters_per_unit=sum(group.parameters_per_unit(graph.shapes) for group in groups),
    )
