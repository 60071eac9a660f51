"""Whole experts: which selections are the routing of a block, and how many experts must stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.families import build

from saap.core.errors import TargetError
from saap.core.records import Layout, Role
from saap.discovery import discover
from saap.discovery.experts import find_routing
from saap.discovery.tags import UNTAGGED, Choice
from saap.settings.prune import PrunableRole
from saap.structure_search.plan import SearchSpace, build_variables

EXPERTS = 12
ALL = torch.arange(EXPERTS)[None]
ROWS = {("gate.weight", 0): range(EXPERTS), ("gate.weight", 1): range(100, 100 + EXPERTS)}


def choice(count: int, rows: torch.Tensor, module: str = "gate") -> Choice:
    return Choice(count, module, rows)


@pytest.mark.parametrize(
    ("choices", "groups", "least"),
    [
        ([choice(3, ALL)], 1, 3),
        # two experts score their group, and the best 2 of 3 groups of 4 have 8 experts, from which 6 are selected
        ([choice(2, ALL.reshape(3, 4)), choice(2, torch.full((1, 3), UNTAGGED)), choice(6, ALL)], 3, 3),
        ([choice(2, ALL.reshape(3, 4)), choice(2, torch.full((1, 3), UNTAGGED)), choice(2, ALL)], 3, 2),
        # one group alone must have enough, as nothing says how many are selected
        ([choice(1, ALL.reshape(3, 4)), choice(2, torch.full((1, 3), UNTAGGED), "other"), choice(3, ALL)], 3, 3),
        # a single group, whose score needs more experts than are selected
        ([choice(2, ALL), choice(1, torch.full((1, 1), UNTAGGED)), choice(1, ALL)], 1, 2),
        ([choice(1, ALL), choice(1, ALL)], 1, 2),  # one maximum after the other
    ],
)  # fmt: skip
def test_as_many_experts_stay_as_the_router_may_select(choices: list[Choice], groups: int, least: int) -> None:
    found = find_routing(ROWS, choices, np.arange(200), EXPERTS)
    assert found is not None
    assert (found.groups, found.least, found.routers) == (groups, least, (("gate.weight", 0),))
    members = found.members(["experts.down_proj"])
    assert [(one.tensor, one.offset) for one in members] == [
        (name, group * EXPERTS // groups) for group in range(groups) for name in ("gate.weight", "experts.down_proj")
    ]


@pytest.mark.parametrize(
    "choices", [[], [choice(2, ALL[:, :4])], [choice(2, ALL + 50)], [choice(2, ALL.reshape(3, 4))]]
)
def test_selections_among_something_else_are_no_routing(choices: list[Choice]) -> None:
    assert find_routing(ROWS, choices, np.arange(200), EXPERTS) is None


def test_experts_without_a_router_that_selects_are_refused_by_name() -> None:
    model = build("mixtral").float()
    for layer in model.model.layers:
        layer.mlp.gate.forward = _always_the_first
    graph = discover(model)
    refused = {refusal.name: refusal.reason for refusal in graph.refused}
    for layer in range(len(graph.blocks)):
        assert refused[f"layers.{layer}.expert"] == "no router that selects among its 4 experts was found"
    space = SearchSpace(roles=(PrunableRole.EXPERT,), layout=Layout.ADAPTIVE, align=1)
    with pytest.raises(TargetError, match="no expert groups can be pruned in this model: no router that selects"):
        build_variables(graph, space)


def _always_the_first(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    halves = states.new_full((len(states), 2), 0.5)
    return halves, halves, torch.tensor([[0, 1]], device=states.device).expand(len(states), 2)


def test_correction_biases_are_buffers_of_the_group() -> None:
    graph = discover(build("glm4_moe"))
    assert not any(name.endswith("correction_bias") for name in graph.shapes)
    groups = graph.of_role(Role.EXPERT)
    assert [group.name for group in groups] == ["layers.1.expert.0", "layers.1.expert.1"]
    assert {group.bundle for group in groups} == {"layers.1.expert"}
    for place, group in enumerate(groups):
        (bias,) = group.buffers
        assert bias.tensor == "model.layers.1.mlp.gate.e_score_correction_bias"
        assert bias.indices(range(4)).tolist() == [4 * place + unit for unit in range(4)]
