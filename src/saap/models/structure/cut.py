"""Physical removal of units: tensor by tensor and in place, without a second copy of the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from saap.core.errors import PlanError
from saap.core.records import AxisSlice, CoupledGroup, Side
from saap.models.checkpoint.modeling_pruned import ArgumentSlice, ConstantOutput, resize, set_attribute
from saap.models.checkpoint.pruned_structure import argument_slice
from saap.models.structure.keep_index import KeepIndex, KeptAxis, Shape
from saap.models.structure.norms import rescale_norm
from saap.models.walk.offload import onload


@torch.no_grad()
def cut_groups(model: nn.Module, groups: Sequence[CoupledGroup], keep: Mapping[str, Sequence[int]]) -> None:
    """Slice every member of a dense group, or of all groups of a bundle, to the units in `keep`, in place.

    If a group keeps nothing, its consumers become constants: their bias or zeros, exactly as if its channels were
    masked. Norms over the axis are rescaled so that removal equals masking.
    """
    losing = [group for group in groups if len(keep.get(group.name, range(group.units))) < group.units]
    if not losing:
        return
    onload(model, groups[0].members[0].tensor, change=True)
    index = KeepIndex(_present_shapes(model, losing), ((group, keep[group.name]) for group in losing))
    for group in losing:
        if not keep[group.name]:
            _empty(model, group, index)
    for tensor, axes in index.items():
        _resize(model, tensor, axes)
    for group in losing:
        _follow(model, group, keep[group.name], index)
    shares = {norm: len(keep[group.name]) / group.units for group in losing for norm in group.scaled_norms}
    for norm, share in shares.items():
        if share:
            rescale_norm(model.get_submodule(norm), share, norm)


def cut_bundles(model: nn.Module, groups: Sequence[CoupledGroup], keep: Mapping[str, Sequence[int]]) -> None:
    """Cut dense groups to the units in `keep` as `cut_groups` does, those of a bundle together."""
    for bundle in bundles_of(groups):
        cut_groups(model, bundle, keep)


def bundles_of(groups: Sequence[CoupledGroup]) -> list[list[CoupledGroup]]:
    """The groups that are cut together."""
    bundles: dict[str, list[CoupledGroup]] = defaultdict(list)
    for group in groups:
        bundles[group.bundle or group.name].append(group)
    return list(bundles.values())


def _resize(model: nn.Module, tensor: str, axes: Mapping[int, KeptAxis]) -> None:
    """Cut a parameter or a buffer, unless a constant has replaced it."""
    module, parameter = held(model, tensor)
    name = tensor.rpartition(".")[2]
    data = module._buffers.get(name) if parameter is None else parameter.data
    if data is None:
        return
    for axis in sorted(axes, reverse=True):
        data = axes[axis].select(data)
    if parameter is None:
        module._buffers[name] = data
    else:
        resize(model, parameter, data)


def _present_shapes(model: nn.Module, groups: Sequence[CoupledGroup]) -> dict[str, Shape]:
    """Current shapes of the groups' tensors and buffers; a weight replaced by a constant is as wide as its outputs."""
    shapes: dict[str, Shape] = {}
    for name in dict.fromkeys(member.tensor for group in groups for member in group.buffers):
        shapes[name] = tuple(model.get_buffer(name).shape)
    for tensor in dict.fromkeys(member.tensor for group in groups for member in group.members):
        module, parameter = held(model, tensor)
        if parameter is not None:
            shapes[tensor] = tuple(parameter.shape)
        elif isinstance(module, ConstantOutput) and tensor.endswith(".weight"):
            shapes[tensor] = (module.width, module.width)
    return shapes


def held(model: nn.Module, tensor: str) -> tuple[nn.Module, nn.Parameter | None]:
    """The module with the parameter of that name, and the parameter unless a constant replaced it."""
    path, _, name = tensor.rpartition(".")
    module = model.get_submodule(path)
    return module, module._parameters.get(name)


def _follow(model: nn.Module, group: CoupledGroup, kept: Sequence[int], index: KeepIndex) -> None:
    """Adapt attributes, arguments, and constants that produce the group's channels to the kept units."""
    for attribute in group.attributes:
        set_attribute(model.get_submodule(attribute.module), attribute.attribute, attribute.value(len(kept)))
    for sliced in group.sliced_arguments:
        module = model.get_submodule(sliced.module)
        earlier = argument_slice(module)
        if earlier is None:
            hook = ArgumentSlice(
                module, argument=sliced.argument, axis=sliced.axis, per_sample=sliced.per_sample, units=group.units,
                kept=kept or (0,),
            )  # fmt: skip
            module.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            earlier.kept = [earlier.kept[unit] for unit in kept or (0,)]
    for member in group.producers if kept else ():
        module = held(model, member.tensor)[0]
        if isinstance(module, ConstantOutput) and member.tensor in index:
            module.width = index.shape(member.tensor)[member.axis]


def can_be_empty(model: nn.Module, group: CoupledGroup) -> bool:
    """Whether constants can replace all modules of the group: none has further parameters (sinks) or submodules."""
    modules = [model.get_submodule(member.tensor.rpartition(".")[0]) for member in group.members]
    return all(set(module._parameters) <= {"weight", "bias"} and not module._modules for module in modules)


def _empty(model: nn.Module, group: CoupledGroup, index: KeepIndex) -> None:
    """Replace the modules of a group that keeps nothing by constants; modules between them see a unit of zeros."""
    by_module: dict[str, list[AxisSlice]] = defaultdict(list)
    for member in group.members:
        by_module[member.tensor.rpartition(".")[0]].append(member)
    for path, members in by_module.items():
        module = model.get_submodule(path)
        covered = all(index.shape(member.tensor)[member.axis] == 0 for member in members)
        if not covered or not can_be_empty(model, group):
            raise PlanError(f"{path} cannot lose all its channels", f"Keep at least one unit of {group.name}")
        of_weight = [member for member in members if member.tensor.endswith(".weight")]
        constant = ConstantOutput(sum(member.width for member in of_weight))
        consumed = [member for member in of_weight if member.side is Side.CONSUMER]
        if consumed:
            width = module.get_parameter("weight").shape[1 - consumed[0].axis]
            constant = ConstantOutput(width, module._parameters.get("bias"))
        model.set_submodule(path, constant)
