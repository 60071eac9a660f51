"""The model reduced to a few of its decoder blocks, without weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ReducedModel:
    """model: a copy without weights (meta device). kept: which blocks of the original it holds, in this order.

    blocks: their paths in the copy.
    """

    model: nn.Module
    kept: tuple[int, ...]
    blocks: tuple[str, ...]


def reduced(model: nn.Module, blocks: Sequence[str], kept: Sequence[int]) -> ReducedModel:
    """Copy `model` with the blocks `kept` (ascending) alone; parameters on the meta device, buffers as they are.

    The original is not touched. Hooks are left behind; attention is the plain implementation, without a cache.
    """
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    for index, path in enumerate(blocks):
        if index not in kept:
            memo[id(model.get_submodule(path))] = nn.Identity()
    twin = copy.deepcopy(model, memo).eval()
    path = blocks[0].rpartition(".")[0]
    parent, _, name = path.rpartition(".")
    remaining = [twin.get_submodule(blocks[index]) for index in kept]
    setattr(twin.get_submodule(parent), name, nn.ModuleList(remaining))
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        _make_plain(getattr(module, "config", None))
    return ReducedModel(twin, tuple(kept), tuple(f"{path}.{place}" for place in range(len(kept))))


def on_meta(reduced_model: ReducedModel) -> nn.Module:
    """Move buffers and other tensors of the copy to the meta device too, in place."""
    for module in reduced_model.model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("meta")
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, value.to("meta"))
    return reduced_model.model


def _make_plain(config: Any) -> None:
    if hasattr(config, "_attn_implementation"):
        config._attn_implementation = "eager"
    if hasattr(config, "use_cache"):
        config.use_cache = False
