"""Physical removal of units: tensor by tensor, in place, so that no second copy of the model is needed."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.errors import PlanError, UnsupportedModelError
from saap.core.records import AxisSlice, CoupledGroup, ModelGraph, Role, Side, StructurePlan, uneven_bundle
from saap.models.checkpoint.differences import PrunedStructure, argument_slice, epsilon_name, structure_of
from saap.models.checkpoint.modeling_pruned import ArgumentSlice, ConstantOutput, resize, set_attribute
from saap.models.structure.norms import constant_share, scaled_weight
from saap.models.walk.arguments import unit_axis
from saap.models.walk.offload import mark_changed, onload
from saap.surgery.depth import drop_blocks


@torch.no_grad()
def cut(model: nn.Module, graph: ModelGraph, plan: StructurePlan) -> PrunedStructure:
    """Remove what `plan` does not keep, in place, and describe the result.

    Groups that `cut_group` has already cut to the plan's units are left as they are. Raises PlanError if a group of
    the plan does not fit the model, UnsupportedModelError if a block cannot be dropped or a norm not rescaled.
    """
    _check(graph, plan)
    for group in graph.groups:
        if group.layer in plan.dropped_blocks:
            continue
        kept = plan.kept(group)
        if len(kept) == group.units or _is_cut(model, graph, group, len(kept)):
            continue
        if group.bundle:
            cut_bundle(model, [other for other in graph.groups if other.bundle == group.bundle], plan)
        else:
            cut_group(model, group, kept)
    if plan.dropped_blocks:
        drop_blocks(model, graph.blocks, plan.dropped_blocks)
    return structure_of(model, graph, plan)


@torch.no_grad()
def cut_group(model: nn.Module, group: CoupledGroup, kept: Sequence[int]) -> None:
    """Slice every member of one dense group to the units `kept` (ascending), in place.

    A group that keeps nothing leaves constants behind: its consumers give their bias or zeros, exactly as if its
    channels were masked. Norms over the axis are rescaled so that removal equals masking.
    """
    _check_units(group, kept)
    if len(kept) == group.units:
        return
    slices = _argument_slices(model, group, kept or (0,))
    onload(model, group.members[0].tensor)
    if not kept:
        _empty(model, group)
    for (tensor, axis), members in _by_axis(group.members).items():
        path, _, name = tensor.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, ConstantOutput) and (name != "bias" or module.bias is None):
            if name == "weight" and members[0].side is Side.PRODUCER and kept:
                module.width -= sum(member.width for member in members) * (group.units - len(kept))
            continue
        parameter = module.get_parameter(name)
        index = _kept_indices(group, members, kept, parameter.shape[axis])
        resize(model, parameter, parameter.data.index_select(axis, index.to(parameter.device)))
    for attribute in group.attributes:
        value = attribute.per_unit * max(len(kept), 1)
        set_attribute(model.get_submodule(attribute.module), attribute.attribute, value)
    for norm in group.scaled_norms if kept else ():
        rescale_norm(model.get_submodule(norm), len(kept) / group.units, norm)
    for path, hook in slices.items():
        module = model.get_submodule(path)
        earlier = argument_slice(module)
        if earlier is not None:
            earlier.kept = [earlier.kept[unit] for unit in hook.kept]
        else:
            module.register_forward_pre_hook(hook, with_kwargs=True)
    mark_changed(model, group.members[0].tensor)


@torch.no_grad()
def cut_bundle(model: nn.Module, groups: Sequence[CoupledGroup], plan: StructurePlan) -> None:
    """Slice what the groups of one bundle share, in place: each part to the units that its own group keeps.

    groups: all groups of one bundle; they keep the same number. Raises PlanError if they would keep nothing.
    """
    onload(model, groups[0].members[0].tensor)
    places: dict[tuple[str, int], dict[int, list[AxisSlice]]] = defaultdict(lambda: defaultdict(list))
    owners: dict[int, CoupledGroup] = {}
    for group in groups:
        _check_units(group, plan.kept(group))
        if not plan.kept(group):
            raise PlanError(f"{group.name} and the groups beside it cannot lose all units", "Keep at least one of each")
        for member in group.members:
            if member.part is not None:
                places[member.tensor, member.axis][member.part].append(member)
                owners[member.part] = group
    for (tensor, axis), parts in places.items():
        parameter = model.get_parameter(tensor)
        matrices = []
        for part, matrix in enumerate(parameter.data):
            index = _kept_indices(owners[part], parts[part], plan.kept(owners[part]), matrix.shape[axis - 1])
            matrices.append(matrix.index_select(axis - 1, index.to(matrix.device)))
        resize(model, parameter, torch.stack(matrices))
    _cut_together(model, [group for group in groups if all(member.part is None for member in group.members)], plan)
    kept = len(plan.kept(groups[0]))
    for attribute in groups[0].attributes:
        set_attribute(model.get_submodule(attribute.module), attribute.attribute, attribute.per_unit * kept)
    for norm in groups[0].scaled_norms:
        rescale_norm(model.get_submodule(norm), kept / groups[0].units, norm)
    mark_changed(model, groups[0].members[0].tensor)


def _cut_together(model: nn.Module, groups: Sequence[CoupledGroup], plan: StructurePlan) -> None:
    """Slice axes on which several groups lie side by side, each axis once."""
    stays: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        for (tensor, axis), members in _by_axis(group.members).items():
            size = model.get_parameter(tensor).shape[axis]
            mask = torch.zeros(size, dtype=torch.bool)
            mask[_kept_indices(group, members, plan.kept(group), size)] = True
            stays[tensor, axis] = stays.get((tensor, axis), mask) & mask
    for (tensor, axis), mask in stays.items():
        parameter = model.get_parameter(tensor)
        resize(model, parameter, parameter.data.index_select(axis, mask.nonzero().flatten().to(parameter.device)))


def rescale_norm(norm: nn.Module, share: float, name: str) -> None:
    """Make an RMS norm over the kept channels equal to the one over all channels with the others zero.

    With sum of squares S over n channels: x / sqrt(S/n + e) = share^-0.5 x / sqrt(S/kept + e/share), share = kept/n.
    So the effective scale is multiplied by share^-0.5 and epsilon by 1/share. How the scale depends on the weight
    (w, or 1 + w as in some families) is measured on the module. Raises UnsupportedModelError where it has no weight.
    """
    epsilon = epsilon_name(norm)
    weight = norm._parameters.get("weight")
    if weight is None or epsilon is None:
        raise UnsupportedModelError(
            f"The norm {name} has no weight or no epsilon that could take up the removed channels",
            "Prune without the role hidden",
        )
    constant = constant_share(norm)
    if constant is None:
        raise UnsupportedModelError(
            f"The scale of the norm {name} is no affine function of its weight", "Prune without the role that it spans"
        )
    weight.data = scaled_weight(weight.data, constant, share**-0.5)
    value = getattr(norm, epsilon)
    setattr(norm, epsilon, (torch.finfo(weight.dtype).eps if value is None else value) / share)


def _check(graph: ModelGraph, plan: StructurePlan) -> None:
    names = {group.name for group in graph.groups}
    unknown = sorted(set(plan.keep) - names)
    if unknown:
        raise PlanError(f"The plan names groups that the model does not have: {', '.join(unknown)}", "Remove them")
    uneven = uneven_bundle(graph, plan.keep)
    if uneven:
        raise PlanError(
            f"The plan keeps different numbers of units of {' and '.join(uneven)}, which share their tensors",
            "Keep the same number of each",
        )
    seen: dict[tuple[str, int], str] = {}
    for group in graph.groups:
        _check_units(group, plan.kept(group))
        if len(plan.kept(group)) == group.units:
            continue
        for key in _by_axis(group.members):
            if seen.setdefault(key, group.bundle or group.name) != (group.bundle or group.name):
                raise UnsupportedModelError(
                    f"The groups {seen[key]} and {group.name} share an axis of {key[0]}",
                    "Prune only one of their roles",
                )
    wrong = [layer for layer in plan.dropped_blocks if not 0 <= layer < len(graph.blocks)]
    if wrong or len(set(plan.dropped_blocks)) >= len(graph.blocks):
        raise PlanError(
            f"The plan drops the blocks {list(plan.dropped_blocks)} of {len(graph.blocks)}", "Keep at least one block"
        )


def _check_units(group: CoupledGroup, kept: Sequence[int]) -> None:
    ascending = all(first < second for first, second in pairwise(kept))
    if not ascending or (kept and not (kept[0] >= 0 and kept[-1] < group.units)):
        raise PlanError(
            f"The kept units of {group.name} are not ascending numbers below {group.units}", "Correct the plan"
        )
    if len(kept) < group.least:
        raise PlanError(
            f"The plan keeps {len(kept)} units of {group.name}", f"Keep {group.least}: each token is sent to so many"
        )
    if not kept and group.layer < 0:
        raise PlanError(f"The plan keeps nothing of {group.name}", "Keep at least one unit of it")


def _by_axis(members: Iterable[AxisSlice]) -> dict[tuple[str, int], list[AxisSlice]]:
    """Members by (tensor, axis); a fused projection has several on one axis."""
    found: dict[tuple[str, int], list[AxisSlice]] = defaultdict(list)
    for member in members:
        same = found[member.tensor, member.axis]
        if all(member.rows(0) != other.rows(0) for other in same):  # a tied tensor may be named twice
            same.append(member)
    return found


def _kept_indices(group: CoupledGroup, members: Iterable[AxisSlice], kept: Sequence[int], size: int) -> Tensor:
    """Indices of an axis that stay: everything but the members' removed units."""
    removed = group.others(kept)
    mask = torch.ones(size, dtype=torch.bool)
    for member in members:
        mask[member.indices(removed)] = False
    return mask.nonzero().flatten()


def _is_cut(model: nn.Module, graph: ModelGraph, group: CoupledGroup, kept: int) -> bool:
    """Whether the group already has the plan's size. Raises PlanError if it has neither that nor the dense one."""
    states = set()
    for (tensor, axis), members in _by_axis(group.members).items():
        path, _, name = tensor.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, ConstantOutput):
            if group.role is not Role.HIDDEN:
                states.add(kept == 0)
            continue
        dense = graph.shapes[tensor][axis]
        beside = [one for one in graph.groups if one.bundle == group.bundle] if group.bundle else [group]
        together = len(beside) if members[0].part is None else 1
        cut_size = dense - together * sum(member.width for member in members) * (group.units - kept)
        size = module.get_parameter(name).shape[axis]
        if size not in (dense, cut_size):
            raise PlanError(f"{tensor} has {size} entries on axis {axis}, not {dense}", "Use the model of the plan")
        states.add(size == cut_size)
    if len(states) > 1:
        raise PlanError(f"The group {group.name} is only partly cut", "Start from the dense model again")
    return states == {True}


def _empty(model: nn.Module, group: CoupledGroup) -> None:
    """Replace the modules of a group that keeps nothing by constants; what lies between them sees one unit of zeros."""
    by_module: dict[str, list[AxisSlice]] = defaultdict(list)
    for member in group.members:
        by_module[member.tensor.rpartition(".")[0]].append(member)
    for path, members in by_module.items():
        module = model.get_submodule(path)
        covered = all(
            not len(_kept_indices(group, same, (), module.get_parameter(tensor.rpartition(".")[2]).shape[axis]))
            for (tensor, axis), same in _by_axis(members).items()
        )
        if set(module._parameters) - {"weight", "bias"} or module._modules or not covered:
            raise PlanError(f"{path} cannot lose all its channels", f"Keep at least one unit of {group.name}")
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _constant(module, members))


def _constant(module: nn.Module, members: Sequence[AxisSlice]) -> ConstantOutput:
    weight = [member for member in members if member.tensor.endswith(".weight")]
    consumed = [member for member in weight if member.side is Side.CONSUMER]
    if consumed:
        width = module.get_parameter("weight").shape[1 - consumed[0].axis]
        return ConstantOutput(width, module._parameters.get("bias"))
    return ConstantOutput(sum(member.width for member in weight))


def _argument_slices(model: nn.Module, group: CoupledGroup, kept: Sequence[int]) -> dict[str, ArgumentSlice]:
    """Hooks for the modules that get a tensor with one entry per unit; which argument it is, one small batch shows.

    The batch has one sample more than there are units, so that no other axis can be mistaken for theirs.
    """
    found: dict[str, ArgumentSlice] = {}
    if not group.sliced_arguments:
        return found
    samples = group.units + 1

    def watch(path: str, module: nn.Module) -> Any:
        signature = inspect.signature(module.forward)

        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            for argument, value in signature.bind(*arguments, **keywords).arguments.items():
                place = unit_axis(value, samples=samples, units=group.units)
                if place is not None:
                    found[path] = ArgumentSlice(
                        module, argument=argument, axis=place[0], per_sample=place[1], units=group.units, kept=kept
                    )

        return hook

    handles = [
        module.register_forward_pre_hook(watch(path, module), with_kwargs=True)
        for path, module in ((path, model.get_submodule(path)) for path in group.sliced_arguments)
    ]
    try:
        device = next(model.parameters()).device
        model(torch.zeros(samples, 3, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    missing = set(group.sliced_arguments) - set(found)
    if missing:
        raise UnsupportedModelError(
            f"{', '.join(sorted(missing))} got no argument with one entry per unit of {group.name}",
            "Prune without the role attention",
        )
    return found
