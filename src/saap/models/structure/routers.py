"""The routers of a mixture of experts, which decide the experts and gates of a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from saap.core.errors import ModelError


def find_routers(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Names of the weights and biases of the routers in the decoder blocks. Raises ModelError if there are none."""
    names = routers_inside(model, blocks)
    if not names:
        raise ModelError(f"{type(model).__name__} has no router in its blocks", "Use another --tuning")
    return names


def routers_inside(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Names of the weights and biases of the routers in the decoder blocks; empty without experts.

    They lie in the module that contains the experts, with one row for each of them.
    """
    return [name for path in blocks for name in _routers_in(model.get_submodule(path), f"{path}.")]


def _routers_in(block: nn.Module, prefix: str) -> Iterator[str]:
    for path, experts in block.named_modules():
        count, around = _number_of_experts(experts), path.rpartition(".")[0]
        for place, module in block.get_submodule(around).named_modules(prefix=around) if path and count > 1 else ():
            own = module.named_parameters(recurse=False)
            rows = {name: value.dim() for name, value in own if value.shape[:1] == (count,)}
            if 2 in rows.values() and not f"{place}.".startswith(f"{path}."):
                yield from (f"{prefix}{place}.{name}" for name, dimensions in rows.items() if dimensions <= 2)


def _number_of_experts(module: nn.Module) -> int:
    """Number of matrices stacked along the first axis of a module's weights, or of modules in a list; 0 for others."""
    if isinstance(module, nn.ModuleList):
        return len(module)
    stacks = [] if isinstance(module, _ConvNd) else [one for one in module.parameters(recurse=False) if one.dim() > 2]
    return len(stacks[0]) if stacks else 0
