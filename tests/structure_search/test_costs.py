"""Second-order costs: what they measure is the loss, whatever stands between a module and the residual stream."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch
from tests import families

from saap.core.records import Role
from saap.discovery import discover
from saap.models.walk.backend import Backend
from saap.models.walk.walk import walk
from saap.structure_search.second_order import SecondOrder, WeightedGrams, gram_bytes


def found_in(backend: Backend, tokens: torch.Tensor, roles: Collection[Role] = tuple(Role)) -> SecondOrder:
    grams = WeightedGrams(backend, tokens, roles)
    walk(backend, tokens, [grams], micro_batch=2)
    return grams.result()


def costs_of(model: Any, samples: int = 3) -> SecondOrder:
    return found_in(Backend(model, discover(model)), families.token_ids(samples, 12))


def test_a_norm_after_the_module_takes_out_its_scale() -> None:
    model = families.build("gemma2")
    for block in model.model.layers:  # the norms' constants must not matter beside the outputs
        block.mlp.down_proj.weight.data.mul_(100)
        block.self_attn.o_proj.weight.data.mul_(100)
    plain = costs_of(model)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(10)
    scaled = costs_of(model)
    for name, scores in plain.scores.items():
        assert scaled.scores[name] == pytest.approx(scores, rel=1e-2), name
        assert np.array_equal(scaled.orders[name], plain.orders[name])


@pytest.mark.parametrize("role", [Role.FFN, Role.ATTENTION])
def test_roles_that_stay_whole_need_no_gram_matrices(role: Role) -> None:
    backend = Backend(families.build("llama"), discover(families.build("llama")))
    tokens = families.token_ids(3, 12)
    alone, every = (found_in(backend, tokens, roles) for roles in ([role], tuple(Role)))
    names = {group.name for group in backend.graph.of_role(role)}
    assert {*alone.scores} == {*alone.grams} == names < {*every.scores}
    for name in names:
        assert np.array_equal(alone.orders[name], every.orders[name])
    assert gram_bytes(backend.graph, [role]) == sum(4 * gram.numel() for gram in alone.grams.values())


def test_the_costs_of_all_units_of_a_module_add_up_to_the_second_order_change() -> None:
    """With every unit gone nothing makes up for them: half the squared output of each token, weighted."""
    model = families.build("llama")
    graph, tokens = discover(model), families.token_ids(3, 12)
    model.requires_grad_(True)
    found = found_in(Backend(model, graph), tokens)
    for group in graph.of_role(Role.FFN):
        module = model.get_submodule(group.consumers[0].tensor.rpartition(".")[0])
        taken: list[torch.Tensor] = []
        handle = module.register_forward_hook(lambda _module, _inputs, output, taken=taken: taken.append(output))
        logits = model(tokens).logits[:, :-1]
        handle.remove()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), taken[0])
        expected = 0.5 * (gradient.square().mean(-1) * taken[0].square().sum(-1)).mean().detach()
        assert float(found.scores[group.name].sum()) == pytest.approx(
            float(expected), rel=0.05
        )  # the Gram matrix is damped
