from __future__ import annotations

import numpy as np
import pytest
import torch
from experiments.method.break_conditions import RemovalEffects
from lab.measures import sampled_units, spread_layers
from tests.families import build

from saap.discovery import discover
from saap.models.structure.masking import masked


@pytest.mark.parametrize(("family", "role"), [("llama", "ffn"), ("llama", "attention"), ("gpt2", "ffn")])
def test_the_effect_is_that_of_the_masked_model(family, role):
    model = build(family)
    graph = discover(model)
    tokens = torch.randint(2, 128, (3, 12), generator=torch.Generator().manual_seed(0))
    group = next(group for group in graph.groups if group.role == role and group.layer == 1)

    def log_probabilities() -> torch.Tensor:
        with torch.no_grad():
            return model(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)

    def losses(logs: torch.Tensor) -> np.ndarray:
        return -logs.gather(-1, tokens[:, 1:, None]).squeeze(-1).mean(1).numpy()

    dense = log_probabilities()
    keep = {group.name: tuple(range(1, group.units))}
    with masked(model, graph, keep):
        without = log_probabilities()
    loss, apart = RemovalEffects(model, graph, tokens).of(group.name, 0)
    np.testing.assert_allclose(loss, losses(without) - losses(dense), atol=1e-6)
    divergence = (dense.exp() * (dense - without)).sum(-1).mean(1).numpy()
    np.testing.assert_allclose(apart, divergence, atol=1e-6)
    assert (np.abs(loss) > 1e-5).any()


def test_units_and_layers_are_spread_and_fixed_by_the_seed():
    assert sampled_units(3, 5, seed=0) == [0, 1, 2]
    drawn = sampled_units(100, 10, seed=1)
    assert drawn == sampled_units(100, 10, seed=1) != sampled_units(100, 10, seed=2)
    assert len(set(drawn)) == 10
    assert list(spread_layers(30, 4)) == [0, 10, 19, 29]
    assert list(spread_layers(2, 5)) == [0, 1]
