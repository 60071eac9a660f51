from __future__ import annotations

import dataclasses

import pytest
from tests.structure_search import synthetic

from saap.core.errors import TargetError
from saap.core.records import Layout, Role
from saap.settings.prune import PrunableRole
from saap.settings.registry import Strategy
from saap.structure_search.budget import WHOLE, DecodeCosts, budget_for_speedup, curve_through, trial_structures
from saap.structure_search.plan import SearchSpace, search

GRAPH = synthetic.graph()
SCORES = synthetic.scores(GRAPH)
COSTS = DecodeCosts(
    curves={Role.FFN: ((1.0, 0.0), (0.5, 0.24), (0.0625, 0.48)), Role.ATTENTION: ((1.0, 0.0), (0.25, 0.12))}, block=0.1
)


def space(*roles: PrunableRole, layout: Layout = Layout.ADAPTIVE) -> SearchSpace:
    return SearchSpace(roles=roles or (PrunableRole.FFN, PrunableRole.ATTENTION), layout=layout, align=4)


def test_a_curve_never_rises_with_the_units_kept() -> None:
    assert curve_through([(0.25, 0.3), (0.75, 0.2), (0.5, 0.15)]) == ((1.0, 0.0), (0.75, 0.2), (0.5, 0.2), (0.25, 0.3))
    assert curve_through([(0.5, -0.1)]) == ((1.0, 0.0), (0.5, 0.0))


def test_between_measured_sizes_the_time_is_linear() -> None:
    assert COSTS.saved(Role.FFN, 0.75) == pytest.approx(0.12)
    assert COSTS.saved(Role.FFN, 1.0) == 0.0
    assert COSTS.saved(Role.FFN, 0.0) == 0.48  # nothing is promised beyond what was measured


def test_what_a_role_saves_is_divided_among_its_groups() -> None:
    budget = budget_for_speedup(GRAPH, COSTS, 1.25)
    assert budget.removal == 0.2 * WHOLE
    half = {group.name: group.units // 2 for group in GRAPH.of_role(Role.FFN)}
    assert budget.removed(GRAPH, half) == pytest.approx(0.24 * WHOLE, abs=len(half))
    one = {"layers.0.ffn": 32}
    assert budget.removed(GRAPH, one) == pytest.approx(0.04 * WHOLE, abs=1)
    assert budget.removed(GRAPH, one, [0, 1]) == pytest.approx(0.2 * WHOLE, abs=1)  # counted with its block


@pytest.mark.parametrize("strategy", [Strategy.UNIFORM, Strategy.IMPORTANCE, Strategy.ADAPTIVE])
@pytest.mark.parametrize("layout", list(Layout))
def test_the_plan_has_the_asked_speed_and_not_a_step_more(strategy: Strategy, layout: Layout) -> None:
    budget = budget_for_speedup(GRAPH, COSTS, 1.3)
    plan = search(GRAPH, SCORES, budget, space(layout=layout), strategy)
    assert budget.speedup(GRAPH, plan) >= 1.3
    steps = [name for name, kept in plan.keep.items() if "ffn" in name and len(kept) < 64]
    given_back = dict(plan.keep)
    for name in steps if layout is Layout.UNIFORM else steps[:1]:
        given_back[name] = tuple(range(len(plan.keep[name]) + 4))
    assert budget.removed(GRAPH, given_back) < budget.removal


def test_whole_blocks_leave_by_their_own_time() -> None:
    budget = budget_for_speedup(GRAPH, COSTS, 1.4)
    plan = search(GRAPH, SCORES, budget, space(PrunableRole.BLOCK), Strategy.UNIFORM)
    assert len(plan.dropped_blocks) == 3
    assert budget.speedup(GRAPH, plan) == pytest.approx(1 / 0.7)


def test_the_largest_speed_is_named() -> None:
    budget = budget_for_speedup(GRAPH, COSTS, 3.0)
    with pytest.raises(TargetError, match=r"speed-up of 3\.00 cannot be reached with.*the largest is 2\.5"):
        search(GRAPH, SCORES, budget, space(), Strategy.UNIFORM)
    with pytest.raises(TargetError, match=r"by dropping whole blocks; the largest is 2\."):
        search(GRAPH, SCORES, budget, space(PrunableRole.BLOCK), Strategy.UNIFORM)


def test_a_trial_keeps_no_more_units_than_there_are() -> None:
    wide = dataclasses.replace(GRAPH.group("layers.5.ffn"), units=1024)
    mixed = dataclasses.replace(GRAPH, groups=(*GRAPH.groups[:-2], wide))
    units = {group.name: group.units for group in mixed.groups}
    trials = [keep for _, _, keep in trial_structures(mixed, [Role.FFN], align=80)]
    assert trials
    assert all(len(kept) <= units[name] for keep in trials for name, kept in keep.items())


def test_a_measured_plan_corrects_the_costs() -> None:
    budget = budget_for_speedup(GRAPH, COSTS, 1.25)
    plan = search(GRAPH, SCORES, budget, space(), Strategy.UNIFORM)
    predicted = budget.speedup(GRAPH, plan)
    better = budget.corrected(predicted=predicted, measured=1.24)
    assert better.speedup(GRAPH, plan) == pytest.approx(1.24, abs=1e-6)
    assert better.removal == budget.removal
    wild = budget.corrected(predicted=predicted, measured=1.0)
    assert wild.removed(GRAPH, plan.keep) == pytest.approx(0.85 * budget.removed(GRAPH, plan.keep), abs=20)
