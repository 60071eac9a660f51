"""The model reduced to a few of its decoder blocks, without its weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ReducedModel:
    """model: a copy on the CPU whose weights are not set. kept: the blocks of the original that it holds, in order.

    blocks: their paths in the copy.
    """

    model: nn.Module
    kept: tuple[int, ...]
    blocks: tuple[str, ...]


def reduced(model: nn.Module, blocks: Sequence[str], kept: Sequence[int]) -> ReducedModel:
    """Copy `model` with the blocks `kept` (ascending) alone; parameters without values, buffers as they are.

    The parameters' memory is reserved but never touched, so it costs nothing until values are written. The original
    is not changed. Hooks are left behind; attention is the plain implementation, without a cache.
    """
    memo: dict[int, Any] = {}
    for index, path in enumerate(blocks):
        if index not in kept:
            memo[id(model.get_submodule(path))] = nn.Identity()
    dropped = tuple(path + "." for index, path in enumerate(blocks) if index not in kept)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(dropped) and id(parameter) not in memo:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    twin = copy.deepcopy(model, memo).eval()
    remove_hook_from_module(twin, recurse=True)  # accelerate's, of a model over several devices
    path = blocks[0].rpartition(".")[0]
    parent, _, name = path.rpartition(".")
    remaining = [twin.get_submodule(blocks[index]) for index in kept]
    setattr(twin.get_submodule(parent), name, nn.ModuleList(remaining))
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        _move_to_cpu(module)
        _make_plain(getattr(module, "config", None))
    return ReducedModel(twin, tuple(kept), tuple(f"{path}.{place}" for place in range(len(kept))))


def _move_to_cpu(module: nn.Module) -> None:
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = _on_cpu(buffer)
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            setattr(module, name, _on_cpu(value))


def _on_cpu(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; ones in place of values that do not exist."""
    return torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.cpu()


def _make_plain(config: Any) -> None:
    if hasattr(config, "_attn_implementation"):
        config._attn_implementation = "eager"
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "grouped_mm"  # the loop over experts depends on the data
    if hasattr(config, "use_cache"):
        config.use_cache = False
