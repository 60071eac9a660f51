"""Mixtures made of a dense model's own channels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lab.dense import Dense, opened
from lab.mixtures import Split, balanced_clusters, fitted_router, least_squares, upcycled
from tests.pipeline import tiny


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    folder: Path = tiny.folder(tmp_path_factory.mktemp("dense"), layers=2)
    with opened(str(folder)) as found:
        return found


def test_a_mixture_that_takes_all_experts_alike_is_the_dense_model(dense: Dense) -> None:
    model = upcycled(dense, Split(experts=4, chosen=4, sequences=2, length=32, spread=0))
    tokens = torch.arange(2, 42).reshape(2, 20)
    torch.testing.assert_close(model(tokens).logits, dense.model(tokens).logits, rtol=1e-3, atol=1e-4)


def test_fewer_experts_of_each_token_lose_little_and_all_are_used(dense: Dense) -> None:
    model = upcycled(dense, Split(experts=4, chosen=2, sequences=2, length=32))
    tokens, numbers = torch.arange(2, 42).reshape(2, 20), []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: numbers.append(output[-1]))
    found, expected = model(tokens).logits, dense.model(tokens).logits
    assert (found - expected).norm() < 0.3 * expected.norm()
    assert all(set(one.flatten().tolist()) == {0, 1, 2, 3} for one in numbers)


def test_clusters_are_of_equal_size_and_of_near_points() -> None:
    points = torch.cat([torch.zeros(4, 2), torch.ones(4, 2), torch.full((4, 2), 5.0)])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    found = balanced_clusters(points[order], 3, 10)
    assert {frozenset((order[each] // 4).tolist()) for each in found} == {frozenset({one}) for one in range(3)}


def test_the_router_orders_experts_as_the_norms_do() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, truth = torch.randn(400, 6, generator=generator), torch.randn(6, 4, generator=generator)
    logits = inputs @ fitted_router(inputs, (10 + inputs @ truth).clamp(min=0.1), 0.5).T
    centred = inputs @ truth - (inputs @ truth).mean(1, keepdim=True)
    assert logits.std() == pytest.approx(0.5)
    assert (logits.argmax(1) == centred.argmax(1)).float().mean() > 0.8


def test_least_squares_starts_from_what_is_there() -> None:
    inputs, start = torch.randn(50, 5), torch.randn(5, 3)
    torch.testing.assert_close(least_squares(inputs, inputs @ start, start, 0.01), torch.zeros(5, 3), atol=1e-5, rtol=0)
