"""The cut of a whole model to a plan, in place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from saap.core.errors import UnsupportedModelError, first_line
from saap.core.records import CoupledGroup, ModelGraph, StructurePlan
from saap.models.checkpoint.layer_fields import text_part
from saap.models.checkpoint.modeling_pruned import auto_classes
from saap.models.checkpoint.pruned_structure import PrunedStructure, structure_of
from saap.models.checkpoint.stock_config import keep_layers, stock_model
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
    for groups in bundles_of([group for group in losing if group.layer not in plan.dropped_blocks]):
        if not _is_cut(model, graph, groups[0]):
            cut_groups(model, groups, plan.keep)
    if plan.dropped_blocks:
        _drop_blocks(model, graph.blocks, plan.dropped_blocks)
    return structure_of(model, graph, plan)


def check_block_removal(model: nn.Module, blocks: Sequence[str]) -> None:
    """Compare the blocks with those of the family's class for one block fewer: the first, and the last.

    Raises UnsupportedModelError if a block computes otherwise in its new place, so that a folder of the remaining
    blocks would open as another model. Models that no auto class knows pass: they are not opened by one.
    """
    config: Any = getattr(model, "config", None)
    if not auto_classes(str(getattr(config, "model_type", ""))):
        return
    depth, container = len(blocks), blocks[0].rpartition(".")[0]
    for dropped in (0, depth - 1):
        kept = [layer for layer in range(depth) if layer != dropped]
        shorter = copy.deepcopy(config)
        difference: str | None = None
        try:
            keep_layers(text_part(shorter), kept, depth)
            with torch.device("meta"):
                built = stock_model(shorter)
            outside, others = (
                {name: value.shape for name, value in one.named_parameters() if not name.startswith(f"{container}.")}
                for one in (model, built)
            )
            difference = next((name for name in outside if outside[name] != others.get(name)), None)
            for new, old in enumerate(kept):
                difference = difference or _difference(
                    model.get_submodule(blocks[old]), built.get_submodule(blocks[new])
                )
        except Exception as error:  # classes that take no other number of layers
            difference = first_line(error)
        if difference:
            raise UnsupportedModelError(
                f"Blocks of {type(model).__name__} depend on how many there are and on their place ({difference})",
                "Prune without the role block",
            )


def _difference(block: nn.Module, other: nn.Module) -> str | None:
    """The first name of a parameter or of a public number or word by which two blocks differ; None if there is none."""
    shapes, others = ({name: value.shape for name, value in one.named_parameters()} for one in (block, other))
    if shapes != others:
        return next(name for name in [*shapes, *others] if shapes.get(name) != others.get(name))
    modules = dict(other.named_modules())
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            plain = isinstance(value, int | float | str) and not name.startswith("_") and name not in BLOCK_NUMBER_NAMES
            if plain and name != "training" and vars(modules[path]).get(name) != value:
                return f"{path}.{name}"
    return None


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
