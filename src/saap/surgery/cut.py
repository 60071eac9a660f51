"""The cut of a whole model to a plan, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from saap.core.errors import UnsupportedModelError, first_line
from saap.core.records import CoupledGroup, ModelGraph, StructurePlan
from saap.models.checkpoint.layer_fields import text_part
from saap.models.checkpoint.pruned_structure import PrunedStructure, structure_of
from saap.models.checkpoint.stock_config import keep_layers
from saap.models.structure.cut import bundles_of, cut_groups, held
from saap.models.structure.keep_index import require_possible

BLOCK_NUMBER_NAMES = ("layer_idx", "layer_id", "layer_number")
"""Attributes that hold a block's own number."""


@torch.no_grad()
def cut(model: nn.Module, graph: ModelGraph, plan: StructurePlan) -> PrunedStructure:
    """Remove what `plan` does not keep, in place, and describe the result.

    Groups that `cut_groups` has already cut to the plan's units are left as they are. Raises PlanError if the plan does
    not fit the graph, UnsupportedModelError if a block cannot be dropped or a norm not rescaled.
    """
    require_possible(graph, plan.keep, plan.dropped_blocks)
    losing = [group for group in graph.groups if len(plan.kept(group)) < group.units]
    owners: dict[tuple[str, int], str] = {}
    for group in losing:
        name = group.bundle or group.name
        for member in group.members:
            other = owners.setdefault((member.tensor, member.axis), name)
            if other != name:
                raise UnsupportedModelError(
                    f"The groups {other} and {group.name} share an axis of {member.tensor}",
                    "Prune only one of their roles",
                )
    for groups in bundles_of([group for group in losing if group.layer not in plan.dropped_blocks]):
        if not _is_cut(model, graph, groups[0]):
            cut_groups(model, groups, plan.keep)
    if plan.dropped_blocks:
        _drop_blocks(model, graph.blocks, plan.dropped_blocks)
    return structure_of(model, graph, plan)


def _drop_blocks(model: nn.Module, blocks: Sequence[str], dropped: Sequence[int]) -> None:
    """Take blocks out of the model, number the others anew and shorten its configuration, in place."""
    kept = [layer for layer in range(len(blocks)) if layer not in dropped]
    config = getattr(model, "config", None)
    if config is not None:
        decoder, remedy = text_part(config), "Prune without the role block"
        if getattr(decoder, "num_hidden_layers", None) != len(blocks):
            raise UnsupportedModelError(f"The configuration does not say that there are {len(blocks)} blocks", remedy)
        try:
            keep_layers(decoder, kept, len(blocks))
        except Exception as error:  # classes that take no other number of layers
            raise UnsupportedModelError(
                f"The configuration does not take another number of layers ({first_line(error)})", remedy
            ) from error
    container: Any = model.get_submodule(blocks[0].rpartition(".")[0])
    for layer in sorted(set(dropped), reverse=True):
        del container[layer]
    for new, old in enumerate(kept):
        for module in container[new].modules():
            for name in BLOCK_NUMBER_NAMES:
                if vars(module).get(name) == old:
                    setattr(module, name, new)


def _is_cut(model: nn.Module, graph: ModelGraph, group: CoupledGroup) -> bool:
    """Whether a group that loses something has been cut already."""
    for member in group.members:
        parameter = held(model, member.tensor)[1]
        if parameter is not None:
            return parameter.shape[member.axis] != graph.shapes[member.tensor][member.axis]
    return True  # constants have taken the place of all
