"""Scores that need no text: random numbers, and the size of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from saap.core.records import AxisSlice, CoupledGroup, FloatArray, ModelGraph
from saap.models.loading.precision import widened
from saap.models.structure.keep_index import unit_channels


def scored_members(graph: ModelGraph, group: CoupledGroup) -> tuple[AxisSlice, ...]:
    """The group's matrices inside decoder blocks; biases and norms are not scored, as in LLM-Pruner."""
    return tuple(
        member
        for member in group.members
        if len(graph.shapes[member.tensor]) > 1 and graph.block_of(member.tensor) >= 0
    )


def block_groups(graph: ModelGraph) -> tuple[CoupledGroup, ...]:
    """The groups that lie in decoder blocks and have something to score; none of a stack of experts."""
    return tuple(
        group for group in graph.groups if group.layer >= 0 and not group.bundle and scored_members(graph, group)
    )


def along_axis(values: Tensor, axis: int) -> Tensor:
    """Sum over all other axes. values: of any shape. Returns (size of the axis,)."""
    return values.sum(dim=[other for other in range(values.ndim) if other != axis]) if values.ndim > 1 else values


def of_units(channels: Tensor, member: AxisSlice, units: int) -> Tensor:
    """Sum over each unit's channels. channels: (size of the member's axis,). Returns (units,)."""
    return channels[unit_channels(member, units, channels.device)].sum(1)


def random_scores(graph: ModelGraph, seed: int) -> dict[str, FloatArray]:
    """A uniform random number for each unit."""
    generator = np.random.default_rng(seed)
    return {group.name: generator.random(group.units) for group in graph.groups if group.layer >= 0}


@torch.no_grad()
def magnitude_scores(model: nn.Module, graph: ModelGraph) -> dict[str, FloatArray]:
    """Sum of the squares of a unit's weights over all members.

    Source: Li et al. 2017 (filters by their norm); over coupled groups as in LLM-Pruner (`l2`), Ma et al. 2023.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {
        group.name: sum_members(
            group, {m: along_axis(widened(weights[m.tensor]).square(), m.axis) for m in scored_members(graph, group)}
        )
        for group in block_groups(graph)
    }


def sum_members(group: CoupledGroup, channels: Mapping[AxisSlice, Tensor]) -> FloatArray:
    """Scores of the units, summed over the members. channels: of each member, (size of its axis,)."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for member, values in channels.items():
        total += of_units(values.cpu().double(), member, group.units)
    scores: FloatArray = total.numpy()
    return scores
