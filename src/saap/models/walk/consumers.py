"""Channels of units as indices, and the modules that read them."""

from __future__ import annotations

import torch
from torch import Tensor

from saap.core.records import AxisSlice, CoupledGroup, ModelGraph, Role


def sole_consumers(graph: ModelGraph) -> dict[str, CoupledGroup]:
    """Groups inside blocks whose channels are read by exactly one module, by the path of that module."""
    return {
        group.consumers[0].tensor.rpartition(".")[0]: group
        for group in graph.groups
        if group.layer >= 0
        and group.role is not Role.QUERY
        and len(group.consumers) == 1
        and group.consumers[0].part is None
    }


def unit_channels(member: AxisSlice, units: int, device: torch.device | None = None) -> Tensor:
    """Indices of each unit along the member's axis: (units, width)."""
    return torch.tensor([list(member.rows(unit)) for unit in range(units)], dtype=torch.long, device=device)
