from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import families

from saap.core.records import CalibrationSet, Role
from saap.discovery import discover
from saap.estimation.estimate import estimate
from saap.models.structure.keep_index import sole_consumers
from saap.models.walk.backend import Backend
from saap.models.walk.spill import Spill
from saap.settings.registry import Importance


def by_scaling(model: Any, tokens: torch.Tensor, path: str, units: list[list[int]]) -> np.ndarray:
    """Mean over tokens of the squared derivative of a sequence's loss by a factor on one unit at one token."""
    module = model.get_submodule(path)
    total = np.zeros(len(units))
    for sequence in tokens:
        factors: list[torch.Tensor] = []

        def scaled(
            _module: Any, arguments: tuple[torch.Tensor, ...], factors: list[torch.Tensor] = factors
        ) -> tuple[torch.Tensor, ...]:
            (x,) = arguments
            factor = x.new_ones(x.shape[1], len(units), requires_grad=True)
            factors.append(factor)
            spread = torch.ones_like(x[0])
            for unit, channels in enumerate(units):
                spread = spread.index_copy(1, torch.tensor(channels), factor[:, [unit] * len(channels)])
            return (x * spread,)

        handle = module.register_forward_pre_hook(scaled)
        logits = model(sequence[None]).logits[0, :-1]
        handle.remove()
        loss = torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, factors)
        total += gradient.square().sum(0).numpy()
    return total / tokens.numel()


def scores_of(backend: Backend, tokens: torch.Tensor, **settings: Any) -> dict[str, np.ndarray]:
    text = CalibrationSet(sources=("ids",), seed=0, tokens=tokens.numpy())
    found = estimate(backend, text, importance=Importance.TOKEN_FISHER, **settings)
    return {name: group.element for name, group in found.groups.items()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_scores_are_half_the_squared_derivatives_by_the_unit_at_each_token(family: str) -> None:
    model = families.build(family)
    graph, tokens = discover(model), families.token_ids(3, 10)
    found = scores_of(Backend(model, graph), tokens, micro_batch=2)
    for path, group in sole_consumers(graph).items():
        units = [list(group.consumers[0].rows(unit)) for unit in range(group.units)]
        assert found[group.name] == pytest.approx(by_scaling(model, tokens, path, units) / 2, rel=1e-3), path


def test_one_block_at_a_time_gives_the_same(tmp_path: Path) -> None:
    model = families.build("llama")
    graph, tokens = discover(model), families.token_ids(5, 10)
    alone = scores_of(Backend(model, graph), tokens, micro_batch=1)
    together = scores_of(Backend(model, graph, spill=Spill(tmp_path)), tokens, micro_batch=2)
    assert alone.keys() == together.keys()
    for name, scores in alone.items():
        assert together[name] == pytest.approx(scores, rel=1e-3), name


def test_multiplying_in_bfloat16_changes_them_little() -> None:
    model = families.build("llama").float()
    graph, tokens = discover(model), families.token_ids(5, 10)
    exact = scores_of(Backend(model, graph), tokens)
    rounded = scores_of(Backend(model, graph, products=torch.bfloat16), tokens)
    for name, scores in exact.items():
        assert not np.array_equal(rounded[name], scores)
        assert rounded[name] == pytest.approx(scores, rel=0.1, abs=0.01 * float(scores.max())), name


@pytest.mark.parametrize("role", [Role.HIDDEN, Role.QUERY])
def test_roles_without_a_sole_consumer_are_scored_with_products_in_bfloat16_too(role: Role) -> None:
    model = families.build("llama").float()
    graph = discover(model, finer_heads=role is Role.QUERY)
    text = CalibrationSet(sources=("ids",), seed=0, tokens=families.token_ids(3, 10).numpy())
    exact, rounded = (
        estimate(Backend(model, graph, products=products), text, roles=[role], importance=Importance.TOKEN_FISHER)
        for products in (None, torch.bfloat16)
    )
    for name, scores in exact.groups.items():
        most = float(scores.element.max())
        assert rounded.groups[name].element == pytest.approx(scores.element, rel=0.2, abs=0.05 * most), name


def test_what_several_modules_read_has_the_element_wise_score() -> None:
    model = families.build("mixtral")
    graph, tokens = discover(model), families.token_ids(3, 10)
    backend, text = Backend(model, graph), CalibrationSet(sources=("ids",), seed=0, tokens=tokens.numpy())
    roles = [Role.FFN, Role.ATTENTION, Role.EXPERT]
    found = estimate(backend, text, roles=roles, importance=Importance.TOKEN_FISHER).groups
    element = estimate(backend, text, roles=roles, importance=Importance.ELEMENT2).groups
    alone = {group.name for group in sole_consumers(graph).values()}
    assert found.keys() == element.keys()
    for name in found.keys() - alone:
        assert np.array_equal(found[name].element, element[name].element), name
    for name in found.keys() & alone:
        assert not np.array_equal(found[name].element, element[name].element), name
