"""Trying a structure without cutting it: removed channels are zeroed where they are consumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saap.core.records import CoupledGroup, ModelGraph, Role, StructurePlan
from saap.models.structure.linear import weight_out_in


def channel_mask(group: CoupledGroup, kept: Sequence[int], width: int, consumer: str | None = None) -> Tensor:
    """Mask over the input channels of a module that reads a group: (width,), True for channels that stay.

    width: input size of the module. consumer: which tensor, by default the first consumer's.
    """
    tensor = group.consumers[0].tensor if consumer is None else consumer
    mask = torch.ones(width, dtype=torch.bool)
    for member in group.consumers:
        if member.tensor == tensor:
            mask[member.indices(range(group.units))] = False
            mask[member.indices(kept)] = True
    return mask


def _zero_channels(mask: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        activation = arguments[0]
        return (activation * mask.to(activation.device, activation.dtype), *arguments[1:])

    return hook


def _pass_through(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
    hidden = arguments[0]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def masked_channels(model: nn.Module, masks: Mapping[str, Tensor], skipped: Sequence[str] = ()) -> Iterator[None]:
    """Zero input channels of linear modules for a while.

    masks: module path -> (channels,) boolean mask of what stays. skipped: paths of blocks that pass their input on.
    """
    handles = [
        model.get_submodule(path).register_forward_pre_hook(_zero_channels(mask)) for path, mask in masks.items()
    ]
    handles += [model.get_submodule(path).register_forward_hook(_pass_through) for path in skipped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def consumer_masks(graph: ModelGraph, keep: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Masks by module path for every consumer of the groups in `keep` that lose something.

    Consumers that are parts of a stacked tensor are no modules: see `zeroed_parts`.
    """
    masks: dict[str, Tensor] = {}
    for group in graph.groups:
        kept = keep.get(group.name)
        if kept is None or len(kept) == group.units or group.layer < 0:
            continue
        for member in group.consumers:
            if member.part is not None:
                continue
            path = member.tensor.rpartition(".")[0]
            mask = channel_mask(group, kept, graph.shapes[member.tensor][member.axis], member.tensor)
            masks[path] = masks[path] & mask if path in masks else mask
    return masks


@contextmanager
def zeroed_parts(model: nn.Module, graph: ModelGraph, keep: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Zero, for a while, what reads the removed channels in each part of a stacked tensor (experts)."""
    with torch.no_grad(), ExitStack() as stack:
        for group in graph.groups:
            gone = group.others(keep.get(group.name, range(group.units)))
            for member in group.consumers if gone else ():
                if member.part is None:
                    continue
                matrix = model.get_parameter(member.tensor).data[member.part]
                index = torch.tensor(member.indices(gone), device=matrix.device)
                before = matrix.index_select(member.axis - 1, index)
                stack.callback(matrix.index_copy_, member.axis - 1, index, before)
                matrix.index_fill_(member.axis - 1, index, 0.0)
        yield


@contextmanager
def narrowed(model: nn.Module, graph: ModelGraph, keep: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Zero, for a while, what makes the hidden channels that `keep` leaves out, so that the residual stream lacks them.

    The norms still take their statistic over all channels, which is what the cut reproduces by rescaling them.
    """
    with torch.no_grad(), ExitStack() as stack:
        for group in graph.of_role(Role.HIDDEN):
            gone = group.others(keep.get(group.name, range(group.units)))
            for member in group.producers if gone else ():
                weight = model.get_parameter(member.tensor).data
                index = torch.tensor(member.indices(gone), device=weight.device)
                stack.callback(weight.index_copy_, member.axis, index, weight.index_select(member.axis, index))
                weight.index_fill_(member.axis, index, 0.0)
        yield


class _NeverChosen(TorchFunctionMode):
    """Takes rows out of the choice of routers: the logits that they give are minus infinity."""

    def __init__(self, routers: Mapping[nn.Parameter, Tensor]) -> None:
        super().__init__()
        self.rows = {id(parameter): rows for parameter, rows in routers.items()}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        if function is nn.functional.linear and len(arguments) > 1 and id(arguments[1]) in self.rows:
            return result.index_fill(-1, self.rows[id(arguments[1])].to(result.device), -torch.inf)
        return result


@contextmanager
def never_chosen(routers: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Routers choose among the other experts for a while. routers: weight (experts, width) -> experts that are gone."""
    if not routers:
        yield
        return
    with _NeverChosen(routers):
        yield


def gone_experts(
    model: nn.Module, graph: ModelGraph, keep: Mapping[str, tuple[int, ...]]
) -> dict[nn.Parameter, Tensor]:
    """For `never_chosen`: the routers' weights and the experts that `keep` leaves out."""
    found: dict[nn.Parameter, Tensor] = {}
    for group in graph.of_role(Role.EXPERT):
        gone = group.others(keep.get(group.name, range(group.units)))
        for member in group.members if gone else ():
            if len(graph.shapes[member.tensor]) == 2:
                found[model.get_parameter(member.tensor)] = torch.tensor(gone)
    return found


@contextmanager
def masked(model: nn.Module, graph: ModelGraph, plan: StructurePlan) -> Iterator[None]:
    """Inside the context the model computes what the plan's cut would, with its weights untouched.

    Where a norm spans the axis of a group inside a block it still sees the removed channels: there the result is only
    near that of the cut.
    """
    skipped = [graph.blocks[layer] for layer in plan.dropped_blocks]
    with (
        masked_channels(model, consumer_masks(graph, plan.keep), skipped),
        zeroed_parts(model, graph, plan.keep),
        never_chosen(gone_experts(model, graph, plan.keep)),
        narrowed(model, graph, plan.keep),
    ):
        yield


@contextmanager
def replaced_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights in linear-like modules for a while. weights: module path -> (outputs, inputs)."""
    kept: dict[str, Tensor] = {}
    try:
        for path, weight in weights.items():
            view = weight_out_in(model.get_submodule(path))
            kept[path] = view.data.clone()
            view.data.copy_(weight)
        yield
    finally:
        for path, weight in kept.items():
            weight_out_in(model.get_submodule(path)).data.copy_(weight)
