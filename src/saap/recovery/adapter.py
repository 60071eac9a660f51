"""The group-wise low-rank adapter, and its exact merge into the zero points."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from saap.models.checkpoint.groupwise import GroupwiseLinear, groupwise_product


class AdaptedLinear(GroupwiseLinear):
    """y = W x + alpha / r * B A pool(x), with W quantised and pool the sum over each group of inputs.

    A (rank, groups), B (out, rank), float32. B A has one number for each output and group, which is what a zero point
    is, so the adapter merges into the zero points without loss. B starts at zero: at first nothing changes.
    Source: SAAP, group-wise fine-tuning; the same form as QA-LoRA (Xu et al. 2023).
    scales: whether each scale is learned as well, as s (1 + scale_delta) rounded to float16; scale_delta (out, groups)
    starts at zero. What is computed with is already rounded, so the merged scale is the very same.
    """

    scale_delta: nn.Parameter | None

    def __init__(
        self, layer: GroupwiseLinear, *, rank: int, alpha: float, generator: torch.Generator, scales: bool = False
    ) -> None:
        weight = layer.quantised
        super().__init__(weight, layer.bias, transposed=layer.transposed)
        self.scaling = alpha / rank
        # Inputs of unit variance give r values of unit variance, whatever the group size.
        first = torch.randn(rank, weight.zero.shape[1], generator=generator) / math.sqrt(self.in_features)
        self.first = nn.Parameter(first.to(weight.zero.device))
        self.second = nn.Parameter(torch.zeros(self.out_features, rank, device=weight.zero.device))
        scale_delta = nn.Parameter(torch.zeros_like(weight.zero)) if scales else None
        self.register_parameter("scale_delta", scale_delta)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (..., in). Returns (..., out)."""
        # the product B A is small, so it joins the zero points here rather than the outputs of every token
        zero = self.zero + self.scaling * (self.second @ self.first)
        scale = self.scale if self.scale_delta is None else scale_with_delta(self.scale, self.scale_delta)
        outputs = groupwise_product(inputs, replace(self.quantised, scale=scale, zero=zero))
        return outputs if self.bias is None else outputs + self.bias

    def merged(self) -> GroupwiseLinear:
        """The same function without an adapter."""
        weight = self.quantised
        if self.scale_delta is not None:
            weight = replace(weight, scale=scale_with_delta(weight.scale, self.scale_delta).detach().half())
        zero = merged_zero(weight.zero, self.first, self.second, self.scaling)
        return GroupwiseLinear(weight.with_zero(zero), self.bias, transposed=self.transposed)


def scale_with_delta(scale: Tensor, scale_delta: Tensor) -> Tensor:
    """The scales s (1 + scale_delta), of values that float16 has; the gradient passes as if they were not rounded.

    scale: (out, groups) float16. scale_delta: (out, groups). Returns the type of `scale_delta`.
    """
    changed = scale.to(scale_delta.dtype) * (1 + scale_delta)
    return changed + (changed.detach().half() - changed.detach())


@torch.no_grad()
def merged_zero(zero: Tensor, first: Tensor, second: Tensor, scaling: float) -> Tensor:
    """The zero points z + scaling * B A, summed in float64 (on the CPU: not every device has it) and returned so.

    zero: (out, groups). first: A, (rank, groups). second: B, (out, rank).
    """
    return zero.cpu().double() + scaling * (second.cpu().double() @ first.cpu().double())
