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

    def _learned_scale(self) -> Tensor:
        """The scales (out, groups), of values that float16 has; the gradient passes as if they were not rounded."""
        if self.scale_delta is None:
            return self.scale
        scale = self.scale.to(self.scale_delta.dtype) * (1 + self.scale_delta)
        return scale + (scale.detach().half() - scale.detach())

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (..., in). Returns (..., out)."""
        # the product B A is small, so it joins the zero points here rather than the outputs of every token
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
