"""The decoder blocks of a model, and a copy of the model with some of them alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn

from saap.core.errors import UnsupportedModelError
from saap.models.checkpoint.stock_config import text_part


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the decoder blocks: the longest outermost nn.ModuleList whose entries all hold parameters.

    Of a model with several parts (one that also reads images) it is looked for in the part that transformers names as
    the decoder, and one with as many entries as the configuration says that there are layers comes first.
    Raises UnsupportedModelError if there is none.
    """
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = path.startswith(tuple(f"{found}." for found in lists))
        if (
            isinstance(module, nn.ModuleList)
            and len(module)
            and not inside
            and all(list(entry.parameters()) for entry in module)
        ):
            lists[path] = module
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no nn.ModuleList whose entries hold parameters, so no decoder blocks",
            "Hold the decoder blocks in one nn.ModuleList",
        )
    decoder = _decoder_path(model)
    stated = getattr(text_part(getattr(model, "config", None)), "num_hidden_layers", None)

    def rank(path: str) -> tuple[bool, bool, int, int]:
        size = sum(parameter.numel() for parameter in lists[path].parameters())
        return path.startswith(decoder), len(lists[path]) == stated, len(lists[path]), size

    path = max(lists, key=rank)
    return tuple(f"{path}.{index}" for index in range(len(lists[path])))


def holder(blocks: Sequence[str], name: str) -> int:
    """Which of the blocks holds the tensor or module of that name, -1 if none does."""
    return next((index for index, path in enumerate(blocks) if f"{name}.".startswith(f"{path}.")), -1)


def _decoder_path(model: nn.Module) -> str:
    """Beginning of the paths of what `get_decoder` of a transformers model returns; "" where it has none."""
    find = getattr(model, "get_decoder", None)
    try:
        decoder = find() if find is not None else None
    except (AttributeError, NotImplementedError):  # the method is there for every class, the part is not
        return ""
    return next((f"{path}." for path, module in model.named_modules() if path and module is decoder), "")


def require_own_weights(model: nn.Module, blocks: Sequence[str]) -> None:
    """Raise UnsupportedModelError if two blocks share a weight, which could not be cut in one of them alone."""
    owners: dict[int, str] = {}
    for path in blocks:
        for name, parameter in model.get_submodule(path).named_parameters():
            owner = owners.setdefault(id(parameter), path)
            if owner != path:
                raise UnsupportedModelError(
                    f"{owner} and {path} share the weight {name}", "Use a model whose blocks have weights of their own"
                )


def kinds_of(model: nn.Module, blocks: Sequence[str]) -> list[list[int]]:
    """Indices of the blocks of each kind: of the same modules, sizes, and flags such as the attention type."""
    kinds: dict[object, list[int]] = {}
    for index, path in enumerate(blocks):
        block = model.get_submodule(path)
        modules = tuple((name, type(module), _flags(module)) for name, module in block.named_modules())
        sizes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters(remove_duplicate=False))
        kinds.setdefault((modules, sizes), []).append(index)
    return list(kinds.values())


def _flags(module: nn.Module) -> tuple[tuple[str, str], ...]:
    public = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    return tuple(sorted((name, str(v)) for name, v in public.items() if v is None or isinstance(v, (bool, str))))


def with_blocks(model: nn.Module, blocks: Sequence[str], kept: Sequence[int]) -> nn.Module:
    """A copy of `model` on the CPU with the blocks `kept` (ascending) alone, at the paths of the first ones.

    Parameters have no values, buffers do. The parameters' memory is reserved but never touched, so it costs nothing
    until values are written. The original is not changed. Hooks are left behind; attention is the plain
    implementation, without a cache.
    """
    dropped = [path for index, path in enumerate(blocks) if index not in kept]
    memo: dict[int, Any] = {id(model.get_submodule(path)): nn.Identity() for path in dropped}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(tuple(f"{path}." for path in dropped)) and id(parameter) not in memo:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    twin = copy.deepcopy(model, memo).eval()
    remove_hook_from_module(twin, recurse=True)  # accelerate's, of a model over several devices
    twin.set_submodule(blocks[0].rpartition(".")[0], nn.ModuleList(twin.get_submodule(blocks[i]) for i in kept))
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        for held in (module._buffers, vars(module)):
            held.update({name: _on_cpu(value) for name, value in held.items() if isinstance(value, Tensor)})
        for name, value in _PLAIN.items():
            if hasattr(getattr(module, "config", None), name):
                setattr(module.config, name, value)
    return twin


# The loop over experts depends on the data, so their grouped products are traced.
_PLAIN = {"_attn_implementation": "eager", "_experts_implementation": "grouped_mm", "use_cache": False}


def _on_cpu(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; ones in place of values that do not exist."""
    return torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.cpu()
