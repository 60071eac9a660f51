"""Experts that are excluded from routing: whatever the router does with its weight, and in whatever type."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saap.core.records import AxisSlice, CoupledGroup, Role, Side
from saap.models.structure.routing import never_chosen

EXPERTS, WIDTH = 6, 5


class Router(nn.Module):
    """weight in float64; the biases, one a parameter and one a buffer, are larger for the removed experts."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, generator=generator).double())
        self.bias = nn.Parameter(torch.arange(EXPERTS).double()[None])
        self.correction = nn.Buffer(torch.arange(EXPERTS).double())


def cast(router: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x.float(), router.weight.float()).sigmoid()


def with_buffer(router: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, router.weight).sigmoid() - 50 + router.correction


def with_parameter(router: Any, x: Tensor) -> Tensor:
    return torch.add(nn.functional.linear(input=x, weight=router.weight).softmax(-1), other=router.bias.squeeze())


def with_bias_of_linear(router: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, router.weight, router.bias.squeeze())


@pytest.mark.parametrize("scores", [cast, with_buffer, with_parameter, with_bias_of_linear])
def test_only_kept_experts_are_selected_and_the_weights_stay(scores: Any) -> None:
    model = nn.ModuleDict({"router": Router()})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    slices = SimpleNamespace(side=Side.PRODUCER, offset=0, width=1, stride=1)
    members = [
        AxisSlice(tensor=f"router.{name}", axis=axis, **vars(slices)) for name, axis in (("weight", 0), ("bias", 1))
    ]
    group = CoupledGroup(
        layer=0, role=Role.EXPERT, name="layers.0.expert", units=EXPERTS, members=tuple(members),
        buffers=(AxisSlice(tensor="router.correction", axis=0, **vars(slices)),),
    )  # fmt: skip
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    kept = (0, 2, 3)
    expected = scores(model.router, x)
    for _ in range(2):  # the second time the weight is cast anew
        with never_chosen(model, [group], {group.name: kept}):
            found = scores(model.router, x)
        assert set(found.topk(len(kept)).indices.flatten().tolist()) == set(kept)
    if scores is not with_parameter:  # a softmax over fewer experts is another one
        torch.testing.assert_close(found[:, kept], expected[:, kept])
    assert torch.equal(scores(model.router, x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
