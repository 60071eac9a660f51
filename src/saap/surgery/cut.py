"""Physical removal of units: tensor by tensor, in place, so that no second copy of the model is needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from saap.core.errors import PlanError, UnsupportedModelError, first_line
from saap.core.records import AxisSlice, CoupledGroup, ModelGraph, Role, Side, StructurePlan
from saap.models.checkpoint.modeling_pruned import ConstantOutput, resize, set_attribute
from saap.models.checkpoint.pruned_structure import (
    PrunedStructure,
    argument_hook,
    argument_slice,
    structure_of,
)
from saap.models.checkpoint.stock_config import keep_layers, text_part
from saap.models.structure.keep_index import KeepIndex, Shape, require_possible
from saap.models.structure.linear import owner
from saap.models.structure.norms import rescale_norm
from saap.models.walk.offload import onload

BLOCK_NUMBER_NAMES = ("layer_idx", "layer_id", "layer_number")
"""Attributes that hold a block's own number."""


@torch.no_grad()
def cut(model: nn.Module, graph: ModelGraph, plan: StructurePlan) -> PrunedStructure:
    """Remove what `plan` does not keep, in place, and describe the result.

    Groups that `cut_groups` has already cut to the plan's units are left as they are. Raises PlanError if a group of
    the plan does not fit the model, UnsupportedModelError if a block cannot be dropped or a norm not rescaled.
    """
    require_possible(graph, plan.keep, plan.dropped_blocks)
    _require_own_axes(graph, plan)
    bundles: dict[str, list[CoupledGroup]] = {}
    for group in graph.groups:
        if group.layer not in plan.dropped_blocks and len(plan.kept(group)) < group.units:
            bundles.setdefault(group.bundle or group.name, []).append(group)
    for groups in bundles.values():
        if not _are_cut(model, graph, groups, plan):
            cut_groups(model, groups, plan.keep)
    if plan.dropped_blocks:
        _drop_blocks(model, graph.blocks, plan.dropped_blocks)
    return structure_of(model, graph, plan)


@torch.no_grad()
def cut_groups(model: nn.Module, groups: Sequence[CoupledGroup], keep: Mapping[str, Sequence[int]]) -> None:
    """Slice every member of a dense group, or of all groups of a bundle, to the units in `keep`, in place.

    A group that keeps nothing leaves constants behind: its consumers give their bias or zeros, exactly as if its
    channels were masked. Norms over the axis are rescaled so that removal equals masking.
    """
    chosen = [
        (group, keep[group.name]) for group in groups if len(keep.get(group.name, range(group.units))) < group.units
    ]
    if not chosen:
        return
    onload(model, groups[0].members[0].tensor, change=True)
    index = KeepIndex(_present_shapes(model, groups), chosen)
    for group, kept in chosen:
        if not kept:
            _empty(model, group, index)
    _select(model, index, {member.tensor: member.axis for group, kept in chosen if kept for member in group.producers})
    shares: dict[str, float] = {}
    for group, kept in chosen:
        for attribute in group.attributes:
            module = model.get_submodule(attribute.module)
            set_attribute(module, attribute.attribute, attribute.value(len(kept)))
        for sliced in group.sliced_arguments:
            module = model.get_submodule(sliced.module)
            earlier = argument_slice(module)
            if earlier is None:
                hook = argument_hook(module, sliced, group.units, kept or (0,))
                module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                earlier.kept = [earlier.kept[unit] for unit in kept or (0,)]
        shares |= dict.fromkeys(group.scaled_norms if kept else (), len(kept) / group.units)
    for norm, share in shares.items():
        rescale_norm(model.get_submodule(norm), share, norm)


def _present_shapes(model: nn.Module, groups: Iterable[CoupledGroup]) -> dict[str, Shape]:
    """Shapes of the groups' tensors as they are; a weight whose place a constant took is as wide as its outputs."""
    shapes: dict[str, Shape] = {}
    for tensor in dict.fromkeys(member.tensor for group in groups for member in group.members):
        module, name = owner(model, tensor)
        parameter = module._parameters.get(name)
        if parameter is not None:
            shapes[tensor] = tuple(parameter.shape)
        elif isinstance(module, ConstantOutput) and name == "weight":
            shapes[tensor] = (module.width, module.width)
    return shapes


def _select(model: nn.Module, index: KeepIndex, produced: Mapping[str, int]) -> None:
    """Cut every tensor to what stays. produced: axes that constants have outputs of, by the weight they replaced."""
    for tensor, axes in index.items():
        module, name = owner(model, tensor)
        parameter = module._parameters.get(name)
        if parameter is not None:
            data = parameter.data
            for axis in sorted(axes, reverse=True):
                data = axes[axis].select(data)
            resize(model, parameter, data)
        elif isinstance(module, ConstantOutput) and produced.get(tensor) in axes:
            module.width = index.shape(tensor)[produced[tensor]]


def _drop_blocks(model: nn.Module, blocks: Sequence[str], dropped: Sequence[int]) -> None:
    """Take blocks out of the model, number the others anew and shorten its configuration, in place."""
    parent = blocks[0].rpartition(".")[0]
    container = model.get_submodule(parent)
    remedy = "Prune without the role block"
    if not isinstance(container, nn.ModuleList) or any(path.rpartition(".")[0] != parent for path in blocks):
        raise UnsupportedModelError("The decoder blocks are not members of one list", remedy)
    kept = [layer for layer in range(len(blocks)) if layer not in dropped]
    config = getattr(model, "config", None)
    if config is not None:
        decoder = text_part(config)
        if getattr(decoder, "num_hidden_layers", None) != len(blocks):
            raise UnsupportedModelError(f"The configuration does not say that there are {len(blocks)} blocks", remedy)
        try:
            keep_layers(decoder, kept, len(blocks))
        except Exception as error:  # classes that take no other number of layers
            raise UnsupportedModelError(
                f"The configuration does not take another number of layers ({first_line(error)})", remedy
            ) from error
    for layer in sorted(set(dropped), reverse=True):
        del container[layer]
    for new, old in enumerate(kept):
        for module in container[new].modules():
            for name in BLOCK_NUMBER_NAMES:
                if vars(module).get(name) == old:
                    setattr(module, name, new)


def _require_own_axes(graph: ModelGraph, plan: StructurePlan) -> None:
    """Raise UnsupportedModelError if two groups that lose units lie on one axis, but for those of one bundle."""
    owners: dict[tuple[str, int], str] = {}
    for group in graph.groups:
        for member in group.members if len(plan.kept(group)) < group.units else ():
            other = owners.setdefault((member.tensor, member.axis), group.bundle or group.name)
            if other != (group.bundle or group.name):
                raise UnsupportedModelError(
                    f"The groups {other} and {group.name} share an axis of {member.tensor}",
                    "Prune only one of their roles",
                )


def _are_cut(model: nn.Module, graph: ModelGraph, groups: Sequence[CoupledGroup], plan: StructurePlan) -> bool:
    """Whether the groups have the plan's size already. Raises PlanError if they have neither that nor the dense one."""
    index = KeepIndex(graph.shapes, ((group, plan.kept(group)) for group in groups))
    states = set()
    for tensor, axes in index.items():
        module, name = owner(model, tensor)
        if isinstance(module, ConstantOutput):
            if groups[0].role is not Role.HIDDEN:
                states.add(not plan.kept(groups[0]))
            continue
        for axis in axes:
            size, dense = module.get_parameter(name).shape[axis], graph.shapes[tensor][axis]
            states.add(size == index.shape(tensor)[axis])
            if size not in (dense, index.shape(tensor)[axis]):
                raise PlanError(f"{tensor} has {size} entries on axis {axis}, not {dense}", "Use the model of the plan")
    if len(states) > 1:
        raise PlanError(f"The group {groups[0].name} is only partly cut", "Start from the dense model again")
    return states == {True}


def _empty(model: nn.Module, group: CoupledGroup, index: KeepIndex) -> None:
    """Put constants in place of the modules of a group that keeps nothing; what lies between sees a unit of zeros."""
    by_module: dict[str, list[AxisSlice]] = defaultdict(list)
    for member in group.members:
        by_module[member.tensor.rpartition(".")[0]].append(member)
    for path, members in by_module.items():
        module = model.get_submodule(path)
        covered = all(index.shape(member.tensor)[member.axis] == 0 for member in members)
        if set(module._parameters) - {"weight", "bias"} or module._modules or not covered:
            raise PlanError(f"{path} cannot lose all its channels", f"Keep at least one unit of {group.name}")
        of_weight = [member for member in members if member.tensor.endswith(".weight")]
        constant = ConstantOutput(sum(member.width for member in of_weight))
        consumed = [member for member in of_weight if member.side is Side.CONSUMER]
        if consumed:
            width = module.get_parameter("weight").shape[1 - consumed[0].axis]
            constant = ConstantOutput(width, module._parameters.get("bias"))
        model.set_submodule(path, constant)
