"""Summary of the coupled structures of a model, as shown by `saap inspect`."""

from __future__ import annotations

import re
from typing import Any

from saap.core.records import CoupledGroup, ModelGraph, Role


def summarise(graph: ModelGraph) -> list[dict[str, Any]]:
    """One row for each kind of group, JSON-able.

    Each row has role, layers (indices, empty for the hidden group), groups (number of this kind), units (in each),
    parameters_per_unit (in each), attributes (that follow the kept units), scaled_norms (number in each) and
    members: tensor (the block's number as *), axis, side, width (indices of one unit).
    """

    def pattern(tensor: str) -> str:
        layer = graph.block_of(tensor)
        path = graph.blocks[layer] if layer >= 0 else ""
        return re.sub(r"\d+$", "*", path) + tensor[len(path) :]

    kinds: dict[tuple[Any, ...], list[CoupledGroup]] = {}
    for group in graph.groups:
        members = tuple((pattern(member.tensor), member.axis, member.width) for member in group.members)
        size = group.parameters_per_unit(graph.shapes)
        kinds.setdefault((list(Role).index(group.role), group.units, size, members), []).append(group)
    rows = []
    for (_, units, size, _), groups in sorted(kinds.items(), key=lambda kind: kind[0][0]):
        group, names = groups[0], ("tensor", "axis", "side", "width", "offset")
        # Groups that repeat over the blocks are listed once.
        listed = dict.fromkeys((pattern(m.tensor), m.axis, str(m.side), m.width, m.offset) for m in group.members)
        rows.append(
            {
                "role": str(group.role),
                "layers": list(dict.fromkeys(one.layer for one in groups if one.layer >= 0)),
                "groups": len(groups),
                "units": units,
                "parameters_per_unit": size,
                "attributes": {attribute.attribute: attribute.per_unit for attribute in group.attributes},
                "scaled_norms": len(group.scaled_norms),
                "members": [dict(zip(names, member, strict=True)) for member in listed],
            }
        )
    return rows
