from __future__ import annotations

import itertools

import pytest
import torch

from saap.models.structure.least_squares import Moments, best_ridge, compensated, removal_order, ridge_fit


def moments(x: torch.Tensor, target: torch.Tensor) -> Moments:
    made = Moments.empty(x.shape[1], target.shape[1], x.device)
    made.add(x, target)
    return made


def test_error_is_the_squared_error() -> None:
    torch.manual_seed(0)
    x, target, weight = torch.randn(50, 4), torch.randn(50, 3), torch.randn(3, 4)
    direct = (target - x @ weight.T).square().sum()
    assert moments(x, target).error(weight) == pytest.approx(float(direct), rel=1e-5)


def test_refit_recovers_a_linear_map() -> None:
    torch.manual_seed(0)
    x, true = torch.randn(400, 6), torch.randn(3, 6)
    target = x @ true.T
    new, error = ridge_fit(
        torch.zeros(3, 6), moments(x[:300], target[:300]), moments(x[300:], target[300:]), (1e-8, 1.0)
    )
    torch.testing.assert_close(new, true, atol=1e-4, rtol=1e-4)
    assert error < 1e-6


def test_refit_keeps_the_weight_when_nothing_is_better() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(20, 6), torch.randn(3, 6)
    noise = torch.randn(20, 3)
    held = torch.randn(100, 6)
    new, error = ridge_fit(weight, moments(x, x @ weight.T + noise), moments(held, held @ weight.T), (1e-6, 1e-3))
    assert torch.equal(new, weight)
    assert error == 1.0


def test_second_order_choice_matches_exhaustive_search_for_one_unit() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    weight = torch.randn(3, 6, dtype=torch.float64)
    gram = x.T @ x
    losses = []
    for gone in range(6):
        rest = [i for i in range(6) if i != gone]
        solved = torch.linalg.lstsq(x[:, rest], x @ weight.T).solution
        losses.append(float((x @ weight.T - x[:, rest] @ solved).square().sum()))
    chosen, cost = removal_order(weight, gram, torch.arange(6)[:, None], 1, ridge=1e-12)
    assert chosen.tolist() == [min(range(6), key=losses.__getitem__)]
    assert float(cost) == pytest.approx(min(losses), rel=1e-6)


def test_second_order_choice_of_wide_units() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    weight = torch.randn(3, 6, dtype=torch.float64)
    units = torch.tensor([[0, 3], [1, 4], [2, 5]])
    losses = {}
    for gone in range(3):
        rest = [i for i in range(6) if i not in units[gone].tolist()]
        solved = torch.linalg.lstsq(x[:, rest], x @ weight.T).solution
        losses[gone] = float((x @ weight.T - x[:, rest] @ solved).square().sum())
    chosen, cost = removal_order(weight, x.T @ x, units, 1, ridge=1e-12, at_once=1)
    assert chosen.tolist() == [min(losses, key=losses.__getitem__)]
    assert float(cost) == pytest.approx(min(losses.values()), rel=1e-6)


def test_greedy_choice_sees_redundant_units() -> None:
    """Of two equal channels exactly one leaves free; the second is then dear."""
    torch.manual_seed(0)
    base = torch.randn(300, 4, dtype=torch.float64)
    x = torch.cat([base, base[:, :1]], dim=1)
    weight = torch.tensor([[5.0, 0.3, 0.3, 0.3, 5.0]], dtype=torch.float64)
    order, _ = removal_order(weight, x.T @ x, torch.arange(5)[:, None], 2, ridge=1e-9, at_once=1)
    chosen = order.tolist()
    assert len({0, 4} & set(chosen)) == 1
    assert all(len(set(pair)) == 2 for pair in itertools.pairwise(chosen))


def test_costs_add_up_to_the_error_of_the_compensated_matrix() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    weight = torch.randn(3, 8, dtype=torch.float64)
    order, costs = removal_order(weight, x.T @ x, torch.arange(8)[:, None], 3, ridge=1e-12, at_once=1)
    kept = torch.tensor(sorted(set(range(8)) - set(order.tolist())))
    left = compensated(weight, x.T @ x, kept, ridge=1e-12)
    assert torch.count_nonzero(left[:, order]) == 0
    assert float((x @ (weight - left).T).square().sum()) == pytest.approx(float(costs.sum()), rel=1e-5)


def test_scores_enter_as_a_geometric_mean():
    x, weight = torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    units = torch.arange(3)[:, None]
    scores = torch.tensor([16.0, 1.0, 1.0], dtype=torch.float64)
    order, costs = removal_order(weight, x, units, 1, ridge=1e-12, scores=scores)
    assert order.tolist() == [1]  # 4 x 1 against 1 x 16 and 9 x 1
    assert costs.item() == pytest.approx(2.0)


@pytest.mark.parametrize("least", range(7))
def test_the_best_ridge_is_found_downhill(least: int) -> None:
    tried: list[float] = []

    def error_of(ridge: float) -> float:
        tried.append(ridge)
        return abs(ridge - least)

    assert best_ridge(range(7), error_of) == (least, 0)
    assert len(tried) <= 7
    assert len(tried) == len(set(tried))
