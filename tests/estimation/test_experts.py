"""Units of experts whose matrices are stacked: scores against autograd, the search's sizes and its judge."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests import families
from tests.estimation.test_estimate import weight_gradients
from torch import nn

from saap.core.errors import PlanError
from saap.core.records import CalibrationSet, CoupledGroup, Layout, ModelGraph, Role, UnitScores
from saap.core.storage import PlanDocument
from saap.discovery import discover
from saap.estimation.estimate import estimate
from saap.models.structure.masking import masked
from saap.models.walk.backend import Backend
from saap.settings.prune import ElementOrder, PrunableRole
from saap.settings.registry import Strategy
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.evaluator import StructureEvaluator
from saap.structure_search.plan import SearchSpace, build_variables, complete_plan, make_plan, search
from saap.surgery.cut import cut

SAMPLES, LENGTH = 3, 9


@pytest.fixture(scope="module")
def mixtral() -> tuple[Any, ModelGraph]:
    model = families.build("mixtral")
    return model, discover(model)


def experts(graph: ModelGraph, layer: int = 0) -> list[CoupledGroup]:
    return [group for group in graph.in_block(layer) if group.bundle]


@pytest.mark.parametrize("order", [ElementOrder.SECOND, ElementOrder.MIXED])
def test_scores_of_experts_are_those_of_the_definitions(mixtral: tuple[Any, ModelGraph], order: ElementOrder) -> None:
    model, graph = mixtral
    tokens = families.token_ids(SAMPLES, LENGTH)
    calibration = CalibrationSet(sources=("random",), seed=0, tokens=tokens.numpy())
    scores = estimate(Backend(model, graph), calibration, element_order=order)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for group in experts(graph, 1):
        vector, element = torch.zeros(group.units).double(), torch.zeros(group.units).double()
        for sample in tokens:
            _, gradients = weight_gradients(model, sample)
            signed = torch.zeros(group.units).double()
            for member in group.members:
                product = (gradients[member.tensor] * model.get_parameter(member.tensor))[member.part]
                rows = product.movedim(member.axis - 1, 0)[member.indices(range(group.units))]
                second = 0.5 * (LENGTH - 1) * rows**2
                signed += rows.sum(1)
                element += (second if order is ElementOrder.SECOND else (rows - second).abs()).sum(1) / SAMPLES
            vector += signed.abs() / SAMPLES
        found = scores.groups[group.name]
        torch.testing.assert_close(torch.from_numpy(found.vector), vector, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(torch.from_numpy(found.element), element, rtol=1e-6, atol=1e-9)


def test_scores_of_whole_experts_are_sums_over_all_their_weights(mixtral: tuple[Any, ModelGraph]) -> None:
    model, graph = mixtral
    tokens = families.token_ids(SAMPLES, LENGTH)
    calibration = CalibrationSet(sources=("random",), seed=0, tokens=tokens.numpy())
    scores = estimate(Backend(model, graph), calibration, roles=[Role.EXPERT])
    assert set(scores.groups) == {"layers.0.expert", "layers.1.expert"}
    for group in graph.of_role(Role.EXPERT):
        vector, element = torch.zeros(4).double(), torch.zeros(4).double()
        for sample in tokens:
            _, gradients = weight_gradients(model, sample)
            stacks = [m.tensor for m in group.members if gradients[m.tensor].ndim == 3]
            assert len(stacks) == 2
            products = [(gradients[name] * model.get_parameter(name)).flatten(1) for name in stacks]
            vector += sum(product.sum(1) for product in products).abs() / SAMPLES
            element += sum(0.5 * (LENGTH - 1) * (product**2).sum(1) for product in products) / SAMPLES
        found = scores.groups[group.name]
        torch.testing.assert_close(torch.from_numpy(found.vector), vector, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(torch.from_numpy(found.element), element, rtol=1e-6, atol=1e-9)


def test_the_judge_sees_what_is_left_when_experts_are_gone(mixtral: tuple[Any, ModelGraph]) -> None:
    model, graph = mixtral
    tokens = families.token_ids(2, LENGTH)
    judge = StructureEvaluator(Backend(model, graph), tokens)
    keep = {"layers.0.expert": (0, 2), "layers.1.expert": (1, 2, 3)}
    plan = make_plan(graph, keep, (), layout=Layout.ADAPTIVE, strategy="by hand", align=1)
    pruned = copy.deepcopy(model)
    cut(pruned, graph, plan)
    dense, left = (one(tokens, use_cache=False).logits.float().log_softmax(-1) for one in (model, pruned))
    expected = torch.nn.functional.kl_div(left, dense, log_target=True, reduction="sum") / tokens.numel()
    assert judge(keep).mean() == pytest.approx(float(expected), rel=1e-4)


def test_an_expert_that_is_never_used_scores_zero(mixtral: tuple[Any, ModelGraph]) -> None:
    model, graph = copy.deepcopy(mixtral[0]), mixtral[1]
    router = model.model.layers[0].mlp.gate
    router.forward = lambda states: (
        None,
        torch.full((len(states.flatten(0, -2)), 2), 0.5).double(),
        _first_two(states),
    )
    calibration = CalibrationSet(sources=("random",), seed=0, tokens=families.token_ids(2, LENGTH).numpy())
    scores = estimate(Backend(model, graph), calibration, roles=[Role.FFN])
    used = [bool(scores.groups[group.name].element.any()) for group in experts(graph)]
    assert used == [True, True, False, False]


def _first_two(states: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[0, 1]]).expand(states.shape[:-1].numel(), 2)


def test_all_experts_of_a_module_keep_the_same_number_each_its_own_units(mixtral: tuple[Any, ModelGraph]) -> None:
    _, graph = mixtral
    generator = torch.Generator().manual_seed(0)
    scores = {
        group.name: UnitScores(
            mean=torch.rand(group.units, generator=generator).double().numpy(),
            variance=torch.ones(group.units).double().numpy(),
        )
        for group in graph.groups
    }
    space = SearchSpace(roles=(PrunableRole.FFN,), layout=Layout.ADAPTIVE, align=8)
    plan = search(graph, scores, budget_for_ratio(graph, 0.2), space, Strategy.IMPORTANCE)
    assert graph.block_parameters - plan.block_parameters >= 0.2 * graph.block_parameters
    for layer in range(len(graph.blocks)):
        kept = [plan.kept(group) for group in experts(graph, layer)]
        assert len({len(units) for units in kept}) == 1
        assert len(set(kept)) == len(kept) or len(kept[0]) == 80


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ({0: 40, 1: 40, 2: 40, 3: 48}, "different numbers of units of layers.0.ffn.expert.0 and layers.0.ffn.expert.3"),
        ({0: 40}, "different numbers of units of layers.0.ffn.expert.0 and layers.0.ffn.expert.1"),
        (dict.fromkeys(range(4), 39), "keeps 39 units of layers.0.ffn.expert.0.*multiple of 8"),
    ],
)
def test_plans_that_stacked_matrices_cannot_follow_are_refused(
    mixtral: tuple[Any, ModelGraph], counts: dict[int, int], problem: str
) -> None:
    groups = {f"layers.0.ffn.expert.{expert}": {"kept": count} for expert, count in counts.items()}
    with pytest.raises(PlanError, match=problem):
        complete_plan(mixtral[1], PlanDocument.model_validate({"format_version": 1, "groups": groups}), {})


def test_sizes_of_experts_keep_whole_strides(mixtral: tuple[Any, ModelGraph]) -> None:
    variables = build_variables(
        mixtral[1],
        SearchSpace(roles=(PrunableRole.FFN, PrunableRole.HIDDEN), layout=Layout.ADAPTIVE, align=4),
    )
    assert [{group.bundle or group.name for group in variable.groups} for variable in variables] == [
        {"layers.0.ffn"},
        {"layers.1.ffn"},
        {"hidden"},
    ]
    assert all(size % 8 == 0 for variable in variables for size in variable.sizes)


def test_experts_that_would_keep_nothing_are_refused(mixtral: tuple[Any, ModelGraph]) -> None:
    model, graph = mixtral
    keep = {group.name: () for group in experts(graph)}
    plan = make_plan(graph, keep, (), layout=Layout.ADAPTIVE, strategy="by hand", align=1)
    with pytest.raises(PlanError, match=r"keeps 0 units of layers\.0\.ffn\.expert\.0"):
        cut(copy.deepcopy(model), graph, plan)


def test_the_judge_sees_the_masked_experts_and_leaves_the_weights(mixtral: tuple[Any, ModelGraph]) -> None:
    model, graph = mixtral
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    keep = {group.name: tuple(range(number, 80, 2)) for number, group in enumerate(experts(graph)[:2])}
    keep |= {group.name: tuple(range(40)) for group in experts(graph)[2:]}
    tokens = families.token_ids(2, LENGTH)
    loss = StructureEvaluator(Backend(model, graph), tokens)(keep).mean()
    plan = make_plan(graph, keep, (), layout=Layout.ADAPTIVE, strategy="by hand", align=1)
    dense = model(tokens, use_cache=False).logits
    with masked(model, graph, plan.keep, plan.dropped_blocks):
        pruned = model(tokens, use_cache=False).logits
    expected = nn.functional.kl_div(pruned.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="sum")
    assert loss == pytest.approx(float(expected) / tokens.numel(), rel=1e-4)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
