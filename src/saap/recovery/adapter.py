"""Trained parameters: group-wise adapters, which merge exactly into the zero points, or plain LoRA."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.errors import ConfigurationError
from saap.models.checkpoint.groupwise import GroupwiseLinear, GroupwiseWeight, groupwise_product
from saap.recovery.sharding import unshard


class AdaptedLinear(GroupwiseLinear):
    """y = W x + alpha / r * B A pool(x), with W quantised and pool the sum over each group of inputs.

    A (rank, groups), B (out, rank), float32. Like the zero points, B A has one number for each output and group, so the
    adapter merges exactly into them. B starts at zero: at first nothing changes.
    Source: SAAP, group-wise fine-tuning; the same form as QA-LoRA (Xu et al. 2023).
    scales: whether each scale is learned as well, as s (1 + scale_delta) rounded to float16; scale_delta (out, groups)
    starts at zero. Training computes with rounded scales, so the merged scale is exactly the same.
    """

    scale_delta: nn.Parameter | None

    def __init__(
        self, layer: GroupwiseLinear, *, rank: int, alpha: float, generator: torch.Generator, scales: bool = False
    ) -> None:
        weight = layer.quantised
        super().__init__(weight, layer.bias, transposed=layer.transposed)
        self.scaling = alpha / rank
        # Inputs of unit variance result in r values of unit variance, for any group size.
        first = torch.randn(rank, weight.zero.shape[1], generator=generator) / math.sqrt(self.in_features)
        self.first = nn.Parameter(first.to(weight.zero.device))
        self.second = nn.Parameter(torch.zeros(self.out_features, rank, device=weight.zero.device))
        scale_delta = nn.Parameter(torch.zeros_like(weight.zero)) if scales else None
        self.register_parameter("scale_delta", scale_delta)

    def _learned_scale(self) -> Tensor:
        """The scales (out, groups) rounded to float16, with a straight-through gradient."""
        if self.scale_delta is None:
            return self.scale
        scale = self.scale.to(self.scale_delta.dtype) * (1 + self.scale_delta)
        return scale + (scale.detach().half() - scale.detach())

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (..., in). Returns (..., out)."""
        # the product B A is small, so it is added to the zero points rather than to the outputs of every token
        zero = self.zero + self.scaling * (self.second @ self.first)
        outputs = groupwise_product(inputs, replace(self.quantised, scale=self._learned_scale(), zero=zero))
        return outputs if self.bias is None else outputs + self.bias

    @torch.no_grad()
    def merged(self) -> GroupwiseLinear:
        """The same function without an adapter, its zero points summed in float64."""
        product = self.second.cpu().double() @ self.first.cpu().double()  # not every device has float64
        zero = (self.zero.cpu().double() + self.scaling * product).to(self.zero)
        weight = replace(self.quantised, scale=self._learned_scale().half(), zero=zero)
        return GroupwiseLinear(weight, self.bias, transposed=self.transposed)


def adapt(model: nn.Module, *, rank: int, alpha: float, seed: int, scales: bool = False) -> dict[str, nn.Parameter]:
    """Give every quantised layer an adapter, in place. Returns the adapters' parameters by name.

    scales: whether the layers' scales are learned too.
    """
    generator = torch.Generator().manual_seed(seed)
    learned: dict[str, nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, GroupwiseLinear):
            adapted = AdaptedLinear(module, rank=rank, alpha=alpha, generator=generator, scales=scales)
            model.set_submodule(path, adapted)
            own = adapted.named_parameters(recurse=False)
            learned |= {f"{path}.{name}": parameter for name, parameter in own if parameter.requires_grad}
    return learned


def merge(model: nn.Module) -> dict[str, GroupwiseWeight]:
    """Merge every adapter into its layer's scales and zero points, in place. Returns the packed weights by path."""
    for path, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            unshard(module)
            model.set_submodule(path, module.merged())
    return {path: module.quantised for path, module in model.named_modules() if isinstance(module, GroupwiseLinear)}


def require_peft() -> None:
    """Raise ConfigurationError early if plain LoRA is unavailable."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigurationError("Plain LoRA needs the package peft", "Run pip install 'saap[recover]'")


def add_lora(
    model: Any, paths: Collection[str], *, rank: int, alpha: float, seed: int
) -> tuple[Any, dict[str, nn.Parameter]]:
    """Plain LoRA on the linear layers at these paths, in place, with peft.

    Returns its handle, whose `merge_and_unload` returns the plain model, and the trained parameters by name.
    """
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads attributes that transformers is about to remove
        torch.manual_seed(seed)
        handle = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(paths))
        )
    return handle, {name: value for name, value in model.named_parameters() if value.requires_grad}


def tuned_matrices(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The matrices that a training changes, one after the other: those under adapters, else the trained ones."""
    packed = [layer for layer in model.modules() if isinstance(layer, AdaptedLinear)]
    if packed:
        return (layer.quantised.dequantised() for layer in packed)
    of_peft = ".base_layer.weight"
    under_lora: list[Tensor] = [value for name, value in model.named_parameters() if name.endswith(of_peft)]
    return iter(under_lora or [one for one in parameters.values() if one.dim() > 1])
