"""Scores of whole experts from a forward pass: against their definitions, and what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import families
from torch import nn

from saap.core.errors import UnsupportedModelError
from saap.core.records import CalibrationSet, GroupScores, ModelGraph, Role, UnitScores
from saap.discovery import discover
from saap.estimation.estimate import estimate, unit_scores, unused_experts
from saap.estimation.expert_reconstruction import DAMPING
from saap.estimation.reap import per_routed_token
from saap.models.walk.backend import Backend
from saap.models.walk.spill import Spill
from saap.models.walk.walker import BlockWalker
from saap.settings.prune import FusionScope, Layout, PrunableRole
from saap.settings.registry import Importance, Strategy
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.plan import SearchSpace, search

SAMPLES, LENGTH = 3, 9
OF_EXPERTS = [name for name in Importance if name.of_experts]


def calibration(tokens: torch.Tensor) -> CalibrationSet:
    return CalibrationSet(sources=("random",), seed=0, tokens=tokens.numpy())


def scores_of(model: Any, graph: ModelGraph, importance: Importance, **how: Any) -> dict[str, UnitScores]:
    text = calibration(families.token_ids(SAMPLES, LENGTH))
    found = estimate(
        Backend(model, graph, spill=how.pop("spill", None)), text, roles=[Role.EXPERT], importance=importance, **how
    )
    return dict(unit_scores(found, graph, importance, FusionScope.LAYER_ROLE))


@pytest.fixture(scope="module", params=("mixtral", "qwen2_moe", "qwen3_moe"))
def mixture(request: pytest.FixtureRequest) -> tuple[Any, ModelGraph]:
    model = families.build(request.param)
    return model, discover(model)


@pytest.fixture(scope="module")
def mixtral() -> tuple[Any, ModelGraph]:
    model = families.build("mixtral")
    return model, discover(model)


@torch.no_grad()
def calls_of(model: Any, tokens: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """What the experts of each layer are called with: states, numbers and gates."""
    calls: list[tuple[torch.Tensor, ...]] = []
    handles = [
        block.mlp.experts.register_forward_hook(lambda _, given, __: calls.append(given))
        for block in model.model.layers
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


@torch.no_grad()
def gated_outputs(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """(experts, tokens, width) by layer, from each expert's own matrices; zero for tokens that do not select it."""
    found = []
    for block, (states, chosen, gates) in zip(model.model.layers, calls_of(model, tokens), strict=True):
        experts, outputs = block.mlp.experts, []
        for expert, down in enumerate(experts.down_proj):
            gate, up = (states @ experts.gate_up_proj[expert].T).chunk(2, -1)
            own = (gates * (chosen == expert)).sum(-1, keepdim=True)
            outputs.append(own * ((nn.functional.silu(gate) * up) @ down.T))
        found.append(torch.stack(outputs))
    return found


def by_definition(model: Any, tokens: torch.Tensor) -> dict[str, tuple[list[float], list[float]]]:
    """Mean of gate x norm over the routed tokens, and their share."""
    found = {}
    each = zip(gated_outputs(model, tokens), calls_of(model, tokens), strict=True)
    for layer, (outputs, (_, chosen, _)) in enumerate(each):
        routed = [int((chosen == expert).sum()) for expert in range(len(outputs))]
        totals = outputs.norm(dim=-1).sum(-1).tolist()
        means = [total / count for total, count in zip(totals, routed, strict=True)]
        found[f"layers.{layer}.expert"] = means, [count / tokens.numel() for count in routed]
    return found


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_scores_are_those_of_the_definitions(mixture: tuple[Any, ModelGraph], micro_batch: int) -> None:
    expected = by_definition(mixture[0], families.token_ids(SAMPLES, LENGTH))
    for importance, place in ((Importance.REAP, 0), (Importance.FREQUENCY, 1)):
        found = scores_of(*mixture, importance, micro_batch=micro_batch)
        assert set(found) == set(expected)
        for name, score in found.items():
            np.testing.assert_allclose(score.mean, expected[name][place], rtol=1e-6)
            assert (score.variance >= 0).all()


@torch.no_grad()
def test_the_reconstruction_error_is_that_of_least_squares(mixtral: tuple[Any, ModelGraph]) -> None:
    model, tokens = mixtral[0], families.token_ids(SAMPLES, LENGTH)
    found = scores_of(*mixtral, Importance.RECONSTRUCTION)
    for layer, outputs in enumerate(gated_outputs(model, tokens)):
        outputs = (outputs / outputs.sum(0).norm(dim=-1, keepdim=True)).flatten(1).double()  # (experts, tokens x width)
        damping = DAMPING * outputs.square().sum(1).mean()
        for expert, own in enumerate(outputs):
            others = torch.cat([outputs[:expert], outputs[expert + 1 :]])
            padded = torch.cat([others.T, damping.sqrt() * torch.eye(len(others))])
            wanted = torch.cat([own, own.new_zeros(len(others))])
            scales = torch.linalg.lstsq(padded, wanted.unsqueeze(1)).solution.squeeze(1)
            lost = (padded @ scales - wanted).square().sum() + damping
            assert found[f"layers.{layer}.expert"].mean[expert] == pytest.approx(float(lost), rel=1e-4)


@pytest.mark.parametrize("family", families.GROUPED)
def test_groups_of_experts_share_a_module(family: str) -> None:
    model = families.build(family)
    graph = discover(model)
    shares = scores_of(model, graph, Importance.FREQUENCY)
    assert set(shares) == {"layers.1.expert.0", "layers.1.expert.1"}
    assert sum(score.mean.sum() for score in shares.values()) == pytest.approx(model.config.num_experts_per_tok)
    found = scores_of(model, graph, Importance.REAP)
    assert all(((score.mean > 0) == (shares[name].mean > 0)).all() for name, score in found.items())


@pytest.mark.parametrize("importance", OF_EXPERTS)
def test_no_backward_pass_is_made(
    mixtral: tuple[Any, ModelGraph], importance: Importance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(BlockWalker, "backward_to_weights")
    each = scores_of(*mixtral, importance)
    spilled = scores_of(*mixtral, importance, spill=Spill(tmp_path))
    for name, score in each.items():
        np.testing.assert_allclose(spilled[name].mean, score.mean)


def test_the_mean_over_routed_tokens_and_its_variance() -> None:
    share, total = np.array([[0.5, 0], [1, 0]]), np.array([[2.0, 0], [3, 0]])  # of two samples and experts
    centred = share - share.mean(0), total - total.mean(0)
    measured = GroupScores(
        vector=share.mean(0), vector_m2=(centred[0] ** 2).sum(0), element=total.mean(0),
        element_m2=(centred[1] ** 2).sum(0), comoment=(centred[0] * centred[1]).sum(0),
    )  # fmt: skip
    found = per_routed_token(measured)
    mean = 2.5 / 0.75
    np.testing.assert_allclose(found.element, [mean, 0])
    np.testing.assert_allclose(found.element_m2, [((0.5 - mean * 0.25) ** 2) * 2 / 0.75**2, 0])
    assert np.array_equal(found.vector, found.element)


def never_the_last(model: Any) -> Any:
    """A copy whose first layer never selects its last expert."""
    model = copy.deepcopy(model)
    stock = nn.functional.linear
    gate = model.model.layers[0].mlp.gate

    def forward(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = stock(states, gate.weight).index_fill(-1, torch.tensor([3]), -torch.inf)
        gates, numbers = logits.softmax(-1).topk(2, -1)
        return logits, gates / gates.sum(-1, keepdim=True), numbers

    gate.forward = forward
    return model


@pytest.mark.parametrize("importance", [*OF_EXPERTS, Importance.FUSED, Importance.TOKEN_FISHER])
def test_an_expert_without_tokens_is_known_and_removed_first(
    mixtral: tuple[Any, ModelGraph], importance: Importance
) -> None:
    model, graph = never_the_last(mixtral[0]), mixtral[1]
    text = calibration(families.token_ids(SAMPLES, LENGTH))
    found = estimate(Backend(model, graph), text, roles=[Role.EXPERT], importance=importance)
    assert unused_experts(found, graph) == {"layers.0.expert": [3]}
    units = unit_scores(found, graph, importance, FusionScope.LAYER_ROLE)
    space = SearchSpace(roles=(PrunableRole.EXPERT,), layout=Layout.UNIFORM, align=1)
    for strategy in (Strategy.UNIFORM, Strategy.STABILITY, Strategy.VOLATILITY_Z, Strategy.VOLATILITY_CV):
        plan = search(graph, units, budget_for_ratio(graph, 0.15), space, strategy)
        kept = plan.keep["layers.0.expert"]
        assert len(kept) == 3
        assert 3 not in kept, strategy


@pytest.mark.parametrize("importance", OF_EXPERTS)
def test_other_units_are_refused(mixtral: tuple[Any, ModelGraph], importance: Importance) -> None:
    text = calibration(families.token_ids(SAMPLES, LENGTH))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.attention is not a stack of experts"):
        estimate(Backend(*mixtral), text, roles=[Role.ATTENTION], importance=importance)


@pytest.mark.parametrize("importance", OF_EXPERTS)
def test_experts_that_are_not_given_their_tokens_are_refused(
    mixtral: tuple[Any, ModelGraph], importance: Importance
) -> None:
    model = copy.deepcopy(mixtral[0])
    for block in model.model.layers:
        block.mlp.experts.forward = lambda states, *, numbers, gates: states
        block.mlp.forward = lambda states, mlp=block.mlp: mlp.experts(states, numbers=None, gates=None)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.experts is not called with the experts"):
        scores_of(model, mixtral[1], importance)
