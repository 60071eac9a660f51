from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import families

from saap.discovery import discover
from saap.estimation.token_fisher import token_fisher_scores
from saap.models.structure.keep_index import sole_consumers
from saap.models.walk.backend import Backend
from saap.models.walk.spill import Spill


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


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_scores_are_squared_derivatives_by_the_unit_at_each_token(family: str) -> None:
    model = families.build(family)
    graph, tokens = discover(model), families.token_ids(3, 10)
    found = token_fisher_scores(Backend(model, graph), tokens, micro_batch=2)
    for path, group in sole_consumers(graph).items():
        units = [list(group.consumers[0].rows(unit)) for unit in range(group.units)]
        assert found[group.name] == pytest.approx(by_scaling(model, tokens, path, units), rel=1e-3), path


def test_one_block_at_a_time_gives_the_same(tmp_path: Path) -> None:
    model = families.build("llama")
    graph, tokens = discover(model), families.token_ids(5, 10)
    alone = token_fisher_scores(Backend(model, graph), tokens, micro_batch=1)
    together = token_fisher_scores(Backend(model, graph, spill=Spill(tmp_path)), tokens, micro_batch=2)
    assert alone.keys() == together.keys()
    for name, scores in alone.items():
        assert together[name] == pytest.approx(scores, rel=1e-3), name


def test_multiplying_in_bfloat16_changes_them_little() -> None:
    model = families.build("llama").float()
    graph, tokens = discover(model), families.token_ids(5, 10)
    exact = token_fisher_scores(Backend(model, graph), tokens)
    rounded = token_fisher_scores(Backend(model, graph, products=torch.bfloat16), tokens)
    for name, scores in exact.items():
        assert not np.array_equal(rounded[name], scores)
        assert rounded[name] == pytest.approx(scores, rel=0.1, abs=0.01 * float(scores.max())), name
