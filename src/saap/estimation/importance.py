"""Importance of channels and units (pure functions of tensors), and the definition of a scoring.

W is a weight, L_n the loss of one sample, and P = W * dL_n/dW the element-wise product. To first order, the loss
changes by -P when the element is set to zero.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from saap.core.records import CoupledGroup, ImportanceScores, ModelGraph, UnitScores
from saap.estimation.statistics import ScoreObserver
from saap.models.loading.precision import at_least_float32
from saap.models.walk.backend import Backend
from saap.settings.prune import Aggregation, ElementOrder, FusionScope

ElementScore = Callable[[Tensor, int, int], Tensor]
"""Element-wise importance of one sample, summed over each channel's elements: of (P, predictions, axis).

P: a matrix; must not be modified. predictions: number of tokens in the mean loss. axis: of the channels. Returns
(channels,).
"""


def channel_change(activation: Tensor, gradient: Tensor) -> Tensor:
    """Sum of P over all weights that consume (or produce) a channel, without the weight gradient: sum_t a * dL/da.

    activation, gradient: (samples, tokens, channels); gradient = d loss_n / d activation in nats. For a module's input
    the sum is over the columns of its weight, for an output without its bias over the rows.
    Returns (samples, channels), signed, in at least float32.
    """
    return torch.einsum("ntc,ntc->nc", at_least_float32(activation), at_least_float32(gradient))


def weight_product(weight: Tensor, activation: Tensor, gradient: Tensor, contracted: int, out: Tensor) -> Tensor:
    """P of one sample and one linear module, written to `out`, which has the weight's shape.

    activation: (tokens, in), gradient: (tokens, out). contracted: the weight's axis of size `in`.
    """
    wider = torch.promote_types(activation.dtype, gradient.dtype)  # products in bfloat16 have their gradients in it
    activation, gradient = activation.to(wider), gradient.to(wider)
    left, right = (gradient, activation) if contracted == 1 else (activation, gradient)
    if out.dtype == left.dtype:
        return torch.mm(left.T, right, out=out).mul_(weight)
    return torch.mul(left.T @ right, weight, out=out)


def first_order(product: Tensor, predictions: int, axis: int) -> Tensor:
    """Sum of |P_i|, an `ElementScore`."""
    return _norm(product, 1, axis)


def second_order(product: Tensor, predictions: int, axis: int) -> Tensor:
    """Sum of 1/2 W_i^2 H_ii, an `ElementScore`.

    H_ii = T (dL_n/dW_i)^2 is the Fisher diagonal of a loss that is the mean over T = `predictions` tokens, so W_i^2
    H_ii = T P_i^2.
    """
    return _norm(product, 2, axis).square_().mul_(predictions / 2)


def mixed_orders(product: Tensor, predictions: int, axis: int) -> Tensor:
    """Sum of |P_i - 1/2 W_i^2 H_ii|, an `ElementScore`. Source: SAAP, fine-grained importance."""
    return _norm(torch.mul(product, product).mul_(-predictions / 2).add_(product), 1, axis)


def _norm(matrix: Tensor, power: int, axis: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(matrix, ord=power, dim=1 - axis)
    return norm


ELEMENT_SCORES: Mapping[ElementOrder, ElementScore] = {
    ElementOrder.FIRST: first_order, ElementOrder.SECOND: second_order, ElementOrder.MIXED: mixed_orders,
}  # fmt: skip


def vector_importance(changes: Tensor, aggregation: Aggregation, last: int) -> Tensor:
    """Vector-wise importance: |sum of P over all weights of the unit|, over all members for the aggregation `sum`.

    changes: (members, samples, units), the signed sums of P in each member. All aggregations but `sum` use the members'
    absolute values. last: index of the member for the aggregation `last`. Returns (samples, units).
    Source: SAAP, coarse-grained importance; aggregations as in LLM-Pruner.
    """
    if aggregation is Aggregation.SUM:
        return changes.sum(0).abs()
    return aggregate(changes.abs(), aggregation, last)


def aggregate(members: Tensor, aggregation: Aggregation, last: int) -> Tensor:
    """One score per unit from those in each member. members: (members, samples, units), not negative."""
    if aggregation is Aggregation.LAST:
        return members[last]
    if aggregation is Aggregation.MAX:
        return members.amax(0)
    return members.sum(0) if aggregation is Aggregation.SUM else members.prod(0)


def measured_units(
    scores: ImportanceScores, graph: ModelGraph, scope: FusionScope, *, statistic: str = "element"
) -> Mapping[str, UnitScores]:
    """Mean and variance over samples of one measured score, `element` or `vector`, by group."""
    freedom = max(scores.samples - 1, 1)
    return {
        name: UnitScores(mean=getattr(group, statistic), variance=getattr(group, f"{statistic}_m2") / freedom)
        for name, group in scores.groups.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Definition of an importance: the measurements of the estimation, and the score of the search.

    element: the element-wise score measured with the vector-wise one, None for the configured order. observer: function
    of the model and the groups to score; its measurements replace the two scores. units: function of the measurements,
    one score per unit.
    """

    element: ElementScore | None = None
    observer: Callable[[Backend, Sequence[CoupledGroup]], ScoreObserver] | None = None
    units: Callable[[ImportanceScores, ModelGraph, FusionScope], Mapping[str, UnitScores]] = measured_units


VECTOR = Scoring(units=partial(measured_units, statistic="vector"))
ELEMENT1 = Scoring(element=first_order)
ELEMENT2 = Scoring(element=second_order)
MIXED = Scoring(element=mixed_orders)
