"""The coupled structures of a model as a few rows: what `saap inspect` shows."""

from __future__ import annotations

import re
from typing import Any

from saap.core.records import AxisSlice, CoupledGroup, ModelGraph, Role


def summarise(graph: ModelGraph) -> list[dict[str, Any]]:
    """One row for each kind of group, JSON-able.

    Each row has role, layers (indices, empty for the hidden group), groups (how many of the kind), units (in each),
    parameters_per_unit (in each), attributes (that follow the kept units), scaled_norms (how many in each) and
    members: tensor (the block's number as *), axis, side, width (indices of one unit).
    """
    kinds: dict[tuple[Any, ...], list[CoupledGroup]] = {}
    for group in graph.groups:
        kinds.setdefault(_kind(graph, group), []).append(group)
    order = list(Role)
    rows = [_row(graph, groups) for groups in kinds.values()]
    return sorted(rows, key=lambda row: order.index(Role(row["role"])))


def _kind(graph: ModelGraph, group: CoupledGroup) -> tuple[Any, ...]:
    members = tuple((_pattern(graph, member.tensor), member.axis, member.width) for member in group.members)
    return (group.role, group.units, group.parameters_per_unit(graph.shapes), members)


def _row(graph: ModelGraph, groups: list[CoupledGroup]) -> dict[str, Any]:
    first = groups[0]
    attributes = {attribute.attribute: attribute.per_unit for attribute in first.attributes}
    return {
        "role": str(first.role),
        "layers": list(dict.fromkeys(group.layer for group in groups if group.layer >= 0)),
        "groups": len(groups),
        "units": first.units,
        "parameters_per_unit": first.parameters_per_unit(graph.shapes),
        "attributes": attributes,
        "scaled_norms": len(first.scaled_norms),
        "members": _members(graph, first.members),
    }


def _members(graph: ModelGraph, members: tuple[AxisSlice, ...]) -> list[dict[str, Any]]:
    """Members with the block's number as *; what repeats over the blocks is named once."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for member in members:
        shown = {
            "tensor": _pattern(graph, member.tensor),
            "axis": member.axis,
            "side": str(member.side),
            "width": member.width,
            "offset": member.offset,
        }
        found.setdefault(tuple(shown.values()), shown)
    return list(found.values())


def _pattern(graph: ModelGraph, tensor: str) -> str:
    block = graph.block_of(tensor)
    if block < 0:
        return tensor
    path = graph.blocks[block]
    return re.sub(r"\d+$", "*", path) + tensor[len(path) :]
