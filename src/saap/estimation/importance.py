"""Importance of channels and units (pure functions of tensors).

W is a weight, L_n the loss of one sample, P = W * dL_n/dW their product element by element: to first order P is the
loss that disappears when the element is set to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saap.models.loading.precision import at_least_float32
from saap.settings.prune import Aggregation, ElementOrder


def channel_change(activation: Tensor, gradient: Tensor) -> Tensor:
    """Sum of P over all weights that read (or make) a channel, without the weight gradient: sum_t a * dL/da.

    activation, gradient: (samples, tokens, channels); gradient = d loss_n / d activation in nats. For a module's
    input the sum goes over its weights' columns, for an output without its bias over the rows.
    Returns (samples, channels), signed, in at least float32.
    """
    return torch.einsum("ntc,ntc->nc", at_least_float32(activation), at_least_float32(gradient))


def weight_product(weight: Tensor, activation: Tensor, gradient: Tensor, contracted: int, out: Tensor) -> Tensor:
    """P of one sample and one linear module, written to `out`, which is of the weight's shape.

    activation: (tokens, in), gradient: (tokens, out). contracted: the weight's axis of size `in`.
    """
    left, right = (gradient, activation) if contracted == 1 else (activation, gradient)
    if out.dtype == left.dtype:
        return torch.mm(left.T, right, out=out).mul_(weight)
    return torch.mul(left.T @ right, weight, out=out)


def element_importance(product: Tensor, predictions: int, order: ElementOrder, axis: int, scratch: Tensor) -> Tensor:
    """Element-wise importance of one sample, summed over each channel's elements: sum_i |P_i - 1/2 W_i^2 H_ii|.

    product: P, a matrix; axis: the one that numbers the channels. H_ii = T (dL_n/dW_i)^2, the Fisher diagonal where
    the loss is the mean over T = `predictions` tokens, so W_i^2 H_ii = T P_i^2. Order 1 keeps the first term, order 2
    the second, mixed both. scratch: of the same shape as P; it is overwritten, `product` is not.
    Source: SAAP, fine-grained importance. Returns (channels,).
    """
    if order is ElementOrder.FIRST:
        return _norm(product, 1, axis)
    if order is ElementOrder.SECOND:
        return _norm(product, 2, axis).square_().mul_(predictions / 2)
    torch.mul(product, product, out=scratch).mul_(-predictions / 2).add_(product)
    return _norm(scratch, 1, axis)


def _norm(matrix: Tensor, power: int, axis: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(matrix, ord=power, dim=1 - axis)
    return norm


def units_of(channels: Tensor, index: Tensor) -> Tensor:
    """Sum over the channels of each unit. channels: (..., channels), index: (units, width). Returns (..., units)."""
    return channels[..., index].sum(-1)


def vector_importance(changes: Tensor, aggregation: Aggregation, last: int) -> Tensor:
    """Vector-wise importance: |sum of P over all weights of the unit|, over all members for the aggregation `sum`.

    changes: (members, samples, units), the signed sums of P in each member. The other aggregations are taken of the
    members' absolute values. last: the member that `last` means. Returns (samples, units).
    Source: SAAP, coarse-grained importance; aggregations as in LLM-Pruner.
    """
    if aggregation is Aggregation.SUM:
        return changes.sum(0).abs()
    return aggregate(changes.abs(), aggregation, last)


def aggregate(members: Tensor, aggregation: Aggregation, last: int) -> Tensor:
    """One score per unit from those in each member. members: (members, samples, units), not negative."""
    match aggregation:
        case Aggregation.SUM:
            return members.sum(0)
        case Aggregation.PROD:
            return members.prod(0)
        case Aggregation.MAX:
            return members.amax(0)
        case Aggregation.LAST:
            return members[last]
