"""Linear-like modules: which axis of the weight is contracted with the input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D


def contracted_axis(module: nn.Module) -> int | None:
    """Axis of `module.weight` that is contracted with the input: 1 for (out, in), 0 for (in, out).

    None for a module that is not linear-like.
    """
    if isinstance(module, nn.Linear):
        return 1
    return 0 if isinstance(module, Conv1D) else None


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All linear-like modules of the model by path."""
    return {path: module for path, module in model.named_modules() if contracted_axis(module) is not None}


def only_multiplies(module: nn.Module) -> bool:
    """Whether a linear-like module gives one tensor, its product, and not for example a routing."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weights = {name: one.to("meta") for name, one in module.named_parameters()}
    read = torch.empty(1, weight_out_in(module).shape[1], dtype=weight_out_in(module).dtype, device="meta")
    try:
        return isinstance(functional_call(module, weights, (read,)), Tensor)
    except (RuntimeError, TypeError, ValueError):  # code that reads values, or more than one input
        return False


def owner(model: nn.Module, tensor_name: str) -> tuple[nn.Module, str]:
    """The module with the parameter of that name, and the parameter's attribute. Raises AttributeError."""
    path, _, attribute = tensor_name.rpartition(".")
    module = model.get_submodule(path)
    getattr(module, attribute)
    return module, attribute


def embedding_of(model: nn.Module, side: str) -> nn.Module | None:
    """The module that the model names as its `input` or `output` embeddings; None if it has none."""
    try:
        found: nn.Module | None = getattr(model, f"get_{side}_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    return found


def weight_out_in(module: nn.Module) -> Tensor:
    """A view of the weight as (out, in). Raises TypeError for a module that is not linear-like."""
    axis, weight = contracted_axis(module), module.weight
    if axis is None or not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} is not a linear-like module")
    return weight if axis == 1 else weight.T
