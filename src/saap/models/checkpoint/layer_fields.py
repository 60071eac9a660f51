"""Configuration fields with other values in single layers, as transformers' `per_layer_config` states them.

Consumers that build their own cache or kernels read numbers of heads from the configuration, not from the modules.
transformers applies the field from 5.19 on; older versions keep it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Self

from saap.core.records import CoupledGroup, ModelGraph, Role, StructurePlan
from saap.models.checkpoint.modeling_pruned import read_dense_sizes

Fields = Mapping[str, tuple[str, ...]]
"""Names of configuration fields by role."""


def text_part(config: Any) -> Any:
    """The part of a transformers configuration that describes the decoder; all of it in text-only models."""
    find = getattr(config, "get_text_config", None)
    return config if find is None else find()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFields:
    """What the configuration of a pruned model states of single layers.

    by_role: the fields that set the size of each role. unstated: roles that have lost units without such a field.
    values: layer -> field -> value, where it differs from the configuration's own. pinned: fields that must be set, or
    single layers would derive another value (the width of a head).
    """

    by_role: Fields = field(default_factory=dict)
    unstated: tuple[str, ...] = ()
    values: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    pinned: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Any, graph: ModelGraph, plan: StructurePlan, earlier: Mapping[str, Any]) -> Self:
        """After a plan.

        config: with the dropped blocks already removed. earlier: `pruned_structure` of the model before; what one of an
        older format has lost of its heads is not known, so they count as unstated. Nothing is stated for a family with
        settings of single layers of its own, as its class would build the layers from ours.
        """
        stated = text_part(config).to_dict() if hasattr(config, "to_dict") else {}
        by_role: Fields = {role: tuple(names) for role, names in earlier.get("layer_fields", {}).items()}
        if not earlier and not stated.get("per_layer_config"):
            by_role = _fields_by_role(graph)
        lost = {str(group.role) for group in graph.groups if len(plan.kept(group)) < group.units}
        before = earlier.get("unstated_roles", [str(Role.ATTENTION)] if earlier else [])
        values = _values(stated, graph, plan, by_role)
        heads = {name for role in (Role.ATTENTION, Role.QUERY) for name in by_role.get(role, ())}
        return cls(
            by_role=by_role,
            unstated=tuple(sorted({*before, *(lost - by_role.keys())})),
            values=values,
            pinned=graph.pinned_fields if any(heads & own.keys() for own in values.values()) else {},
        )

    def record(self) -> dict[str, Any]:
        """What `pruned_structure` says of it; the rest is in the configuration itself."""
        return {"layer_fields": dict(self.by_role), "unstated_roles": list(self.unstated)}

    def state_in(self, config: Any) -> None:
        """Set `per_layer_config` in place. The configuration's own values stay readable: they are the dense model's."""
        text = text_part(config)
        for name, value in self.pinned.items():
            setattr(text, name, value)
        if self.values:
            text.allow_global_per_layer_attribute_access = True
            text.per_layer_config = {layer: dict(own) for layer, own in self.values.items()}
            read_dense_sizes(text)


def _fields_by_role(graph: ModelGraph) -> dict[str, tuple[str, ...]]:
    """Of the roles inside the blocks."""
    roles = {group.role for group in graph.groups if group.layer >= 0}
    found = {str(role): tuple(one.name for one in graph.config_fields if one.role is role) for role in sorted(roles)}
    return {role: names for role, names in found.items() if names}


def _values(
    stated: Mapping[str, Any], graph: ModelGraph, plan: StructurePlan, by_role: Fields
) -> dict[int, dict[str, Any]]:
    """The value of each field in each layer: its earlier one times the kept share of each role that sets it."""
    found = {int(layer): dict(own) for layer, own in (stated.get("per_layer_config") or {}).items()}
    kept_blocks = [layer for layer in range(len(graph.blocks)) if layer not in plan.dropped_blocks]
    for new, layer in enumerate(kept_blocks):
        groups, own = {str(group.role): group for group in graph.in_block(layer)}, found.setdefault(new, {})
        for name in {name: None for names in by_role.values() for name in names}:
            before, setting = own.get(name, stated.get(name)), [role for role in by_role if name in by_role[role]]
            if before is not None:
                value = _scaled(before, [groups[role] for role in setting if role in groups], plan)
                if value != before:
                    own[name] = value
    return {layer: own for layer, own in found.items() if own}


def _scaled(before: int, groups: Sequence[CoupledGroup], plan: StructurePlan) -> int:
    """A role without any kept unit counts as one unit, as the modules around the constants see it."""
    return before * prod(max(len(plan.kept(group)), 1) for group in groups) // prod(group.units for group in groups)
