"""Weights that are trained themselves, without adapters: routers alone, or everything in the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from saap.models.loading.precision import at_least_float32
from saap.models.structure.linear import owner


def weights_inside(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Names of all floating-point parameters of the decoder blocks."""
    inside = tuple(f"{path}." for path in blocks)
    found = ((name, value) for name, value in model.named_parameters() if name.startswith(inside))
    return [name for name, value in found if value.is_floating_point() and value.numel()]


class _Rounded(nn.Module):
    """A weight that is trained in at least float32, and used in the type of the model."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, trained: Tensor) -> Tensor:
        return trained.to(self.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        return (at_least_float32(weight),)  # one of several may have another type


class TunedWeights:
    """Weights of a model, made trainable in place. parameters: by their names."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        self._model = model
        self.parameters: dict[str, nn.Parameter] = {}
        for name in names:
            module, attribute = owner(self._model, name)
            register_parametrization(module, attribute, _Rounded(getattr(module, attribute).dtype), unsafe=True)
            trained = module.parametrizations[attribute].original0  # type: ignore[union-attr, index]
            self.parameters[name] = trained.requires_grad_(True)

    def merge_and_unload(self) -> Any:
        """The model with its tuned weights as plain ones."""
        for name in self.parameters:
            module, attribute = owner(self._model, name)
            tuned = getattr(module, attribute).detach()
            remove_parametrizations(module, attribute, leave_parametrized=True)
            setattr(module, attribute, nn.Parameter(tuned, requires_grad=False))
        return self._model
