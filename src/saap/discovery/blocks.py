"""The decoder blocks of a model, and which of them are alike."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from saap.core.errors import UnsupportedModelError
from saap.models.checkpoint.stock_config import text_part

Kind = tuple[object, ...]


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the decoder blocks: the longest outermost nn.ModuleList whose entries all hold parameters.

    Of a model with several parts (one that also reads images) it is looked for in the part that transformers names as
    the decoder, and one with as many entries as the configuration says that there are layers comes first.
    Raises UnsupportedModelError if there is none.
    """
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(found + ".") for found in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and _all_hold_parameters(module):
            lists[path] = module
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no nn.ModuleList whose entries hold parameters, so no decoder blocks",
            "Hold the decoder blocks in one nn.ModuleList",
        )
    decoder = _decoder_path(model)
    in_decoder = [path for path in lists if path.startswith(decoder)]
    stated = getattr(text_part(getattr(model, "config", None)), "num_hidden_layers", None)

    def rank(path: str) -> tuple[bool, int, int]:
        found = lists[path]
        return len(found) == stated, len(found), sum(parameter.numel() for parameter in found.parameters())

    path = max(in_decoder or lists, key=rank)
    return tuple(f"{path}.{index}" for index in range(len(lists[path])))


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


def _decoder_path(model: nn.Module) -> str:
    """Beginning of the paths of what `get_decoder` of a transformers model gives; "" where it has none."""
    find = getattr(model, "get_decoder", None)
    try:
        decoder = find() if find is not None else None
    except (AttributeError, NotImplementedError):  # the method is there for every class, the part is not
        return ""
    return next((f"{path}." for path, module in model.named_modules() if path and module is decoder), "")


def block_kind(block: nn.Module) -> Kind:
    """What two blocks must share to be taken for alike: modules, parameters, and flags such as the attention type."""
    modules = tuple(
        (
            path,
            type(module),
            tuple(sorted((name, str(value)) for name, value in vars(module).items() if _is_flag(name, value))),
        )
        for path, module in block.named_modules()
    )
    parameters = tuple((name, tuple(p.shape)) for name, p in block.named_parameters(remove_duplicate=False))
    return (modules, parameters)


def alike(model: nn.Module, blocks: Sequence[str]) -> list[list[int]]:
    """Indices of the blocks of each kind, in the order in which the kinds first appear."""
    kinds: dict[Kind, list[int]] = {}
    for index, path in enumerate(blocks):
        kinds.setdefault(block_kind(model.get_submodule(path)), []).append(index)
    return list(kinds.values())


def _all_hold_parameters(modules: nn.ModuleList) -> bool:
    return all(next(module.parameters(), None) is not None for module in modules)


def _is_flag(name: str, value: object) -> bool:
    return not name.startswith("_") and name != "training" and (value is None or isinstance(value, (bool, str)))
