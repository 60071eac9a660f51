from __future__ import annotations

import pytest
import torch

from saap.estimation.importance import (
    aggregate,
    channel_change,
    first_order,
    mixed_orders,
    second_order,
    vector_importance,
    weight_product,
)
from saap.models.structure.keep_index import units_of
from saap.settings.prune import Aggregation


def linear_case() -> tuple[torch.Tensor, ...]:
    """One linear module under a loss per sample: weight, bias, input and output with gradients per sample."""
    torch.manual_seed(0)
    weight = torch.randn(5, 4, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64)
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    target = torch.randn(3, 7, 5, dtype=torch.float64)
    return weight, bias, x, target


def losses(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((x @ weight.T + bias - target) ** 4).mean((1, 2))


def test_change_of_channels_equals_weight_times_its_gradient() -> None:
    weight, bias, x, target = linear_case()
    x.requires_grad_(True)
    output = (x @ weight.T).detach().requires_grad_(True)
    (d,) = torch.autograd.grad(((output + bias - target) ** 4).mean((1, 2)).sum(), output)
    (dx,) = torch.autograd.grad(losses(weight, bias, x, target).sum(), x)
    for sample in range(3):
        own = weight.clone().requires_grad_(True)
        losses(own, bias, x.detach(), target)[sample].backward()
        product = weight * own.grad
        torch.testing.assert_close(channel_change(output.detach(), d)[sample], product.sum(1), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(channel_change(x.detach(), dx)[sample], product.sum(0), rtol=1e-12, atol=1e-14)
        for contracted, w in ((1, weight), (0, weight.T.contiguous())):
            found = weight_product(w, x[sample].detach(), d[sample], contracted, torch.empty_like(w))
            expected = product if contracted == 1 else product.T
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("axis", [0, 1])
def test_element_orders_by_hand(axis: int) -> None:
    p = torch.tensor([[1.0, -2.0, 0.5], [0.25, 0.0, 3.0]], dtype=torch.float64)
    predictions = 4
    terms = {
        first_order: p.abs(),
        second_order: 2 * p**2,
        mixed_orders: torch.tensor([[1.0, 10.0, 0.0], [0.125, 0.0, 15.0]], dtype=torch.float64),
    }
    for score, expected in terms.items():
        before = p.clone()
        torch.testing.assert_close(score(p, predictions, axis), expected.sum(1 - axis))
        assert torch.equal(p, before)


def test_second_order_is_half_the_fisher_estimate_of_the_loss_change() -> None:
    w, gradient, predictions = torch.tensor([[2.0]]), torch.tensor([[0.3]]), 5
    torch.testing.assert_close(
        second_order(w * gradient, predictions, 0), 0.5 * w[0] ** 2 * predictions * gradient[0] ** 2
    )


def test_units_gather_their_channels() -> None:
    channels = torch.arange(12.0).view(2, 6)
    index = torch.tensor([[4, 5], [0, 2]])
    assert units_of(channels, index).tolist() == [[9, 2], [21, 14]]


def test_aggregations_by_hand() -> None:
    changes = torch.tensor([[[1.0, -3.0]], [[-4.0, 1.0]], [[2.0, 2.0]]])
    expected = {Aggregation.SUM: [1.0, 0.0], Aggregation.PROD: [8.0, 6.0], Aggregation.MAX: [4.0, 3.0]}
    for aggregation, values in expected.items():
        assert vector_importance(changes, aggregation, 1).tolist() == [values]
    assert vector_importance(changes, Aggregation.LAST, 1).tolist() == [[4.0, 1.0]]
    assert aggregate(changes.abs(), Aggregation.SUM, 0).tolist() == [[7.0, 6.0]]


def test_half_precision_is_summed_in_float32() -> None:
    ones = torch.ones(1, 3000, 1, dtype=torch.bfloat16)
    assert channel_change(ones, ones).item() == 3000
