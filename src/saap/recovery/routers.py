"""Tuning of the routers alone: which experts a token gets, and their gates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from saap.core.errors import ModelError
from saap.models.loading.precision import at_least_float32


def find_routers(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Names of the weights and biases of the routers in the decoder blocks. Raises ModelError if there are none.

    They lie in the module that contains the experts, with one row for each of them.
    """
    names = [name for path in blocks for name in _routers_in(model.get_submodule(path), f"{path}.")]
    if not names:
        raise ModelError(f"{type(model).__name__} has no router in its blocks", "Use another --tuning")
    return names


def _routers_in(block: nn.Module, prefix: str) -> Iterator[str]:
    for path, experts in block.named_modules():
        count, around = _number_of_experts(experts), path.rpartition(".")[0]
        for place, module in block.get_submodule(around).named_modules(prefix=around) if path and count > 1 else ():
            rows = {name: value.dim() for name, value in module.named_parameters(recurse=False) if len(value) == count}
            if 2 in rows.values() and not f"{place}.".startswith(f"{path}."):
                yield from (f"{prefix}{place}.{name}" for name, dimensions in rows.items() if dimensions <= 2)


def _number_of_experts(module: nn.Module) -> int:
    """Number of matrices stacked along the first axis of a module's weights, or of modules in a list; 0 for others."""
    if isinstance(module, nn.ModuleList):
        return len(module)
    stacks = [] if isinstance(module, _ConvNd) else [one for one in module.parameters(recurse=False) if one.dim() > 2]
    return len(stacks[0]) if stacks else 0


class _Rounded(nn.Module):
    """A weight that is trained in at least float32, and used in the type of the model."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, trained: Tensor) -> Tensor:
        return trained.to(self.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        return (at_least_float32(weight),)  # one of several may have another type


class TunedRouters:
    """The routers of a model, made trainable in place. parameters: by the names of the weights."""

    def __init__(self, model: Any, blocks: Sequence[str]) -> None:
        self._model = model
        self.parameters: dict[str, nn.Parameter] = {}
        for name in find_routers(model, blocks):
            module, attribute = self._place(name)
            register_parametrization(module, attribute, _Rounded(getattr(module, attribute).dtype), unsafe=True)
            trained = module.parametrizations[attribute].original0  # type: ignore[union-attr, index]
            self.parameters[name] = trained.requires_grad_(True)

    def merge_and_unload(self) -> Any:
        """The model with its tuned routers as plain weights."""
        for name in self.parameters:
            module, attribute = self._place(name)
            tuned = getattr(module, attribute).detach()
            remove_parametrizations(module, attribute, leave_parametrized=True)
            setattr(module, attribute, nn.Parameter(tuned, requires_grad=False))
        return self._model

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, attribute = name.rpartition(".")
        return self._model.get_submodule(path), attribute
