"""Masking: evaluate a structure without cutting, by zeroing removed channels at their consumers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.records import ModelGraph, Role
from saap.models.structure.keep_index import KeepIndex
from saap.models.structure.linear import weight_out_in
from saap.models.structure.routing import never_chosen
from saap.models.walk.walker import find_hidden


@contextmanager
def masked(
    model: nn.Module, graph: ModelGraph, keep: Mapping[str, tuple[int, ...]], dropped_blocks: Sequence[int] = ()
) -> Iterator[None]:
    """Context in which the model computes as if cut to these kept units and blocks. keep: by group.

    Units are zeroed in the inputs of the linear modules that consume them. Stacked matrices (experts) and producers of
    hidden channels are zeroed themselves inside the context, and removed experts are never selected. Norms still
    compute their statistic over all hidden channels, which the cut reproduces by rescaling them. If a norm spans the
    axis of a group inside a block, the result only approximates that of the cut.
    """
    index = KeepIndex.of(graph, keep)
    losing = [group for group in graph.groups if len(keep.get(group.name, range(group.units))) < group.units]
    roles = {
        (member.tensor, member.axis): group.role
        for group in losing
        for member in (group.producers if group.role is Role.HIDDEN else group.consumers)
    }
    experts = [group for group in losing if group.role is Role.EXPERT]
    with torch.no_grad(), ExitStack() as stack:
        for layer in dropped_blocks:
            block = model.get_submodule(graph.blocks[layer])
            stack.callback(block.register_forward_hook(_pass_through, with_kwargs=True).remove)
        for (tensor, axis), role in roles.items():
            lost = index[tensor][axis]
            if None not in lost.removed or role is Role.HIDDEN:
                stack.enter_context(lost.zeroed(model.get_parameter(tensor).data))
            else:
                hook = partial(_zero_channels, torch.from_numpy(lost.removed[None]))
                module = model.get_submodule(tensor.rpartition(".")[0])
                stack.callback(module.register_forward_pre_hook(hook).remove)
        if experts:
            stack.enter_context(never_chosen(model, experts, keep))
        yield


def _zero_channels(removed: Tensor, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    activation = arguments[0]
    return (activation.index_fill(-1, removed.to(activation.device), 0), *arguments[1:])


def _pass_through(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
    hidden = find_hidden(module, arguments, keywords)[1]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def replaced_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Context with replaced weights in linear-like modules. weights: module path -> (outputs, inputs)."""
    with ExitStack() as stack:
        for path, weight in weights.items():
            view = weight_out_in(model.get_submodule(path)).data
            stack.callback(view.copy_, view.clone())
            view.copy_(weight)
        yield
