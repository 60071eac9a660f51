"""The decoder blocks of a model, and shallow copies of the model with only some of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

from saap.core.errors import UnsupportedModelError
from saap.models.checkpoint.layer_fields import text_part
from saap.models.checkpoint.modeling_pruned import ArgumentSlice


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the decoder blocks: the longest outermost nn.ModuleList whose entries all have parameters.

    In a multimodal model, only the part that transformers returns as the decoder is searched. A list with as many
    entries as the configuration has layers takes precedence.
    Raises UnsupportedModelError if there is none.
    """
    lists: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        inside = path.startswith(tuple(f"{found}." for found in lists))
        blocks = list(module) if isinstance(module, nn.ModuleList) and not inside else []
        if blocks and all(list(block.parameters()) for block in blocks):
            lists[path] = blocks
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no nn.ModuleList whose entries have parameters, so no decoder blocks",
            "Put the decoder blocks into one nn.ModuleList",
        )
    try:
        decoder = getattr(model, "get_decoder", lambda: None)()
    except (AttributeError, NotImplementedError):  # classes may have the method without having the part
        decoder = None
    within = next((f"{path}." for path, module in model.named_modules() if path and module is decoder), "")
    stated = getattr(text_part(getattr(model, "config", None)), "num_hidden_layers", None)

    def rank(path: str) -> tuple[bool, bool, int, int]:
        size = sum(parameter.numel() for block in lists[path] for parameter in block.parameters())
        return path.startswith(within), len(lists[path]) == stated, len(lists[path]), size

    path = max(lists, key=rank)
    return tuple(f"{path}.{index}" for index in range(len(lists[path])))


def holder(blocks: Sequence[str], name: str) -> int:
    """Index of the block that contains the tensor or module of that name, -1 if none does."""
    return next((index for index, path in enumerate(blocks) if f"{name}.".startswith(f"{path}.")), -1)


def require_own_weights(model: nn.Module, blocks: Sequence[str]) -> None:
    """Raise UnsupportedModelError if two blocks share a weight, which cannot be cut in only one of them."""
    owners: dict[int, str] = {}
    for path in blocks:
        for name, parameter in model.get_submodule(path).named_parameters():
            owner = owners.setdefault(id(parameter), path)
            if owner != path:
                raise UnsupportedModelError(
                    f"{owner} and {path} share the weight {name}", "Use a model whose blocks have weights of their own"
                )


def kinds_of(model: nn.Module, blocks: Sequence[str]) -> list[list[int]]:
    """Indices of the blocks of each kind: blocks with equal modules, sizes, and flags such as the attention type."""

    def flags(module: nn.Module) -> list[tuple[str, str]]:
        public = {name: v for name, v in vars(module).items() if not name.startswith("_") and name != "training"}
        return sorted((name, str(v)) for name, v in public.items() if v is None or isinstance(v, (bool, str)))

    kinds: dict[str, list[int]] = {}
    for index, path in enumerate(blocks):
        block = model.get_submodule(path)
        modules = [(name, id(type(module)), flags(module)) for name, module in block.named_modules()]
        sizes = [(name, tuple(p.shape)) for name, p in block.named_parameters(remove_duplicate=False)]
        kinds.setdefault(repr((modules, sizes)), []).append(index)
    return list(kinds.values())


def with_blocks(model: nn.Module, blocks: Sequence[str], kept: Sequence[int]) -> nn.Module:
    """A copy of `model` on the CPU with only the blocks `kept` (ascending), renumbered from 0.

    Parameters have no values, buffers do. The parameters' memory is reserved but never touched, so it costs nothing
    until values are written. The original is not changed. Hooks are not copied; attention is the eager implementation
    without a cache.
    """
    dropped = [path for index, path in enumerate(blocks) if index not in kept]
    memo: dict[int, Any] = {id(model.get_submodule(path)): nn.Identity() for path in dropped}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(tuple(f"{path}." for path in dropped)) and id(parameter) not in memo:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    twin = copy.deepcopy(model, memo).eval()
    remove_hook_from_module(twin, recurse=True)  # accelerate's hooks of a model on several devices
    twin.set_submodule(blocks[0].rpartition(".")[0], nn.ModuleList(twin.get_submodule(blocks[i]) for i in kept))
    for module in twin.modules():
        _clear_hooks(module)
        for held in (module._buffers, vars(module)):
            for name, value in held.items():
                if isinstance(value, Tensor):  # ones in place of missing values
                    held[name] = torch.ones(value.shape, dtype=value.dtype) if value.is_meta else value.cpu()
        for name, value in _PLAIN.items():
            if hasattr(getattr(module, "config", None), name):
                setattr(module.config, name, value)
    return twin


def _clear_hooks(module: nn.Module) -> None:
    """Remove all hooks but those of an earlier pruning, without which the model does not run."""
    module._forward_hooks.clear()
    for key, hook in [*module._forward_pre_hooks.items()]:
        if not isinstance(hook, ArgumentSlice):
            del module._forward_pre_hooks[key]


# The loop over experts is data-dependent, so their grouped products are traced instead.
_PLAIN = {"_attn_implementation": "eager", "_experts_implementation": "grouped_mm", "use_cache": False}
