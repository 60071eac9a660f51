"""The modules that read the channels of coupled groups."""

from __future__ import annotations

import torch
from torch import Tensor

from saap.core.records import CoupledGroup, ModelGraph, Role


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


def channels_of_units(group: CoupledGroup) -> Tensor:
    """Input channels of each unit in the group's first consumer: (units, width)."""
    return torch.tensor([list(group.consumers[0].rows(unit)) for unit in range(group.units)])
