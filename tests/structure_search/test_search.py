from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.structure_search.synthetic import CHANNELS, HEADS, graph, scores

from saap.core.errors import ConfigurationError, TargetError
from saap.core.records import Layout, Role, UnitScores, count_parameters
from saap.core.storage import PlanDocument
from saap.models.structure.keep_index import KeepIndex
from saap.settings.prune import PrunableRole, SkipLayers
from saap.settings.registry import Strategy
from saap.structure_search.budget import (
    Budget,
    budget_for_bytes,
    budget_for_parameters,
    budget_for_ratio,
    header_bytes,
)
from saap.structure_search.plan import SearchSpace, build_variables, complete_plan, make_plan, search
from saap.structure_search.problem import SearchGuide, SearchProblem
from saap.structure_search.strategies import relative_volatility, standardised_fluctuation

GRAPH = graph()
SCORES = scores(GRAPH)
FFN_AND_ATTENTION = (PrunableRole.FFN, PrunableRole.ATTENTION)


def space(roles=FFN_AND_ATTENTION, layout=Layout.ADAPTIVE, align=8, skip_layers=None) -> SearchSpace:
    return SearchSpace(roles=roles, layout=layout, align=align, skip_layers=skip_layers)


def largest_step(of: SearchSpace) -> int:
    return max(variable.parameters_per_unit * variable.step for variable in build_variables(GRAPH, of))


def test_standardised_fluctuation_by_hand() -> None:
    got = standardised_fluctuation(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(got, [-np.sqrt(1.5), 0, np.sqrt(1.5)])
    np.testing.assert_array_equal(standardised_fluctuation(np.full(4, 2.0)), np.zeros(4))


def test_relative_volatility_by_hand() -> None:
    got = relative_volatility(np.array([2.0, 1.0, 0.0, 0.0]), np.array([4.0, 9.0, 1.0, 0.0]))
    np.testing.assert_allclose(got, [1.0, 3.0, np.inf, 0.0])


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0.0, 0.5),
    align=st.sampled_from([1, 4, 8, 16]),
    strategy=st.sampled_from(list(Strategy)),
    layout=st.sampled_from(list(Layout)),
)
def test_removes_what_is_asked_and_at_most_a_step_more(ratio, align, strategy, layout) -> None:
    budget = budget_for_ratio(GRAPH, ratio)
    of = space(layout=layout, align=align)
    plan = search(GRAPH, SCORES, budget, of, strategy)
    removed = GRAPH.block_parameters - plan.block_parameters
    assert budget.removal <= removed < budget.removal + largest_step(of)
    shapes = KeepIndex.of(GRAPH, plan.keep).shapes
    assert plan.parameters == count_parameters(shapes)
    for name, kept in plan.keep.items():
        if name.endswith("ffn"):
            assert len(kept) % align == 0
        assert len(kept) >= 1
        assert list(kept) == sorted(set(kept))
    if layout is Layout.UNIFORM:
        assert len({len(kept) for name, kept in plan.keep.items() if name.endswith("ffn")}) <= 1


def test_importance_removes_the_least_important_units_of_all_layers() -> None:
    plan = search(
        GRAPH, SCORES, budget_for_ratio(GRAPH, 0.1), space(roles=(PrunableRole.FFN,), align=1), Strategy.IMPORTANCE
    )
    kept = np.concatenate([SCORES[name].mean[list(units)] for name, units in plan.keep.items()])
    gone = np.concatenate([np.delete(SCORES[name].mean, list(units)) for name, units in plan.keep.items()])
    assert gone.max() <= kept.min()


def test_volatility_removes_the_most_volatile_units() -> None:
    plan = search(GRAPH, SCORES, budget_for_ratio(GRAPH, 0.1), space(align=1), Strategy.VOLATILITY_Z)
    for name, units in plan.keep.items():
        assert np.delete(SCORES[name].variance, list(units)).min() >= SCORES[name].variance[list(units)].max()


def test_the_uniform_share_is_rounded_down_where_units_are_few() -> None:
    everywhere = space(skip_layers=SkipLayers())
    plan = search(GRAPH, SCORES, budget_for_ratio(GRAPH, 0.15), everywhere, Strategy.UNIFORM)
    # less than a quarter is not yet one of four heads, so the channels alone give it
    assert {GRAPH.group(name).role for name in plan.keep} == {Role.FFN}
    plan = search(GRAPH, SCORES, budget_for_ratio(GRAPH, 0.3), everywhere, Strategy.UNIFORM)
    attention = [kept for name, kept in plan.keep.items() if GRAPH.group(name).role is Role.ATTENTION]
    assert [len(kept) for kept in attention] == [HEADS - 1] * 6


def test_ends_are_spared_by_default_and_on_request() -> None:
    plan = search(
        GRAPH, SCORES, budget_for_ratio(GRAPH, 0.05), space(skip_layers=SkipLayers(first=2, last=1)), Strategy.UNIFORM
    )
    assert {GRAPH.group(name).layer for name in plan.keep} <= {2, 3, 4}


def test_unreachable_target_names_the_reachable() -> None:
    with pytest.raises(TargetError, match="at most 0"):
        search(GRAPH, SCORES, budget_for_ratio(GRAPH, 0.99), space(align=32), Strategy.UNIFORM)


@pytest.mark.parametrize(("ratio", "remedy"), [(0.45, "a smaller --align"), (0.95, "more roles or layers")])
def test_the_remedy_of_an_unreachable_target_is_what_helps(ratio: float, remedy: str) -> None:
    of = space(roles=(PrunableRole.FFN,), align=32)
    with pytest.raises(TargetError, match=f"or allow {remedy}"):
        search(GRAPH, SCORES, budget_for_ratio(GRAPH, ratio), of, Strategy.UNIFORM)


def test_dropped_blocks_count_in_the_remedy_of_an_unreachable_target() -> None:
    of, budget = space((PrunableRole.BLOCK, PrunableRole.FFN), align=32), budget_for_ratio(GRAPH, 0.99)
    # five of six blocks, and half the channels of the last one
    with pytest.raises(TargetError, match=r"at most 15,552 can\. Ask for a reduction of at most 0\.9,") as caught:
        search(GRAPH, SCORES, budget, of, Strategy.UNIFORM)
    assert f"{budget.removal:,} parameters" in str(caught.value)


def test_a_role_whose_blocks_are_all_skipped_or_dropped_is_refused_as_such() -> None:
    of = space((PrunableRole.BLOCK, PrunableRole.FFN), skip_layers=SkipLayers(first=3))
    with pytest.raises(TargetError, match="all blocks with ffn groups are skipped or dropped"):
        search(GRAPH, SCORES, budget_for_ratio(GRAPH, 0.65), of, Strategy.UNIFORM)


def test_adaptive_takes_from_attention_as_long_as_the_loss_falls() -> None:
    def evaluator(keep, dropped) -> np.ndarray:
        lost = sum(CHANNELS - len(kept) for name, kept in keep.items() if name.endswith("ffn"))
        return np.array([lost, lost + 1.0])

    budget, guide = budget_for_ratio(GRAPH, 0.3), SearchGuide(evaluator=evaluator, evaluations=60)
    start = search(GRAPH, SCORES, budget, space(), Strategy.ADAPTIVE)
    found = search(GRAPH, SCORES, budget, space(), Strategy.ADAPTIVE, guide)
    assert all(len(kept) == HEADS for name, kept in start.keep.items() if name.endswith("attention"))
    assert any(len(kept) < HEADS for name, kept in found.keep.items() if name.endswith("attention"))
    assert {"uniform, attention 0.5, first 1 and last 0 protected", "importance"} <= {one.name for one in found.trail}
    assert found.trail[0].loss == evaluator(found.keep, ()).mean() == min(one.loss for one in found.trail)
    assert search(GRAPH, SCORES, budget, space(), Strategy.ADAPTIVE, guide) == found


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        ([-0.1, 0.3], False), ([0.2, 0.3], True), ([0.1, 0.3], False), ([0.2], False), ([0.03, 0.02], True),
        ([-0.1, -0.1], False),
        ([np.nan, 0.3], False), ([np.inf, 0.3], False),
    ],
)  # fmt: skip
def test_what_takes_from_attention_must_be_better_by_more_than_two_standard_errors(
    gains: list[float], kept: bool
) -> None:
    def evaluator(keep, dropped) -> np.ndarray:
        of_attention = any(name.endswith("attention") and len(left) < HEADS for name, left in keep.items())
        return 1 - np.array(gains) if of_attention else np.ones(len(gains))

    guide = SearchGuide(evaluator=evaluator, evaluations=12)
    found = search(GRAPH, SCORES, budget_for_ratio(GRAPH, 0.3), space(), Strategy.ADAPTIVE, guide)
    assert (found.trail[0].name == "uniform, first 1 and last 0 protected") is not kept
    assert found.trail[0].loss == evaluator(found.keep, ()).mean()


@pytest.mark.parametrize("first", [[np.nan, np.nan], [np.inf, 1.0]], ids=str)
def test_a_first_plan_whose_loss_is_not_finite_is_replaced(first: list[float]) -> None:
    def evaluator(keep, dropped) -> np.ndarray:
        of_attention = any(name.endswith("attention") and len(left) < HEADS for name, left in keep.items())
        return np.ones(2) if of_attention else np.array(first)

    guide = SearchGuide(evaluator=evaluator, evaluations=12)
    found = search(GRAPH, SCORES, budget_for_ratio(GRAPH, 0.3), space(), Strategy.ADAPTIVE, guide)
    assert found.trail[0].loss == 1


def test_a_share_of_attention_that_changes_nothing_is_not_the_last() -> None:
    measured = []

    def evaluator(keep, dropped) -> np.ndarray:
        measured.append(keep)
        return np.full(2, 1.0 + sum(CHANNELS - len(kept) for name, kept in keep.items() if name.endswith("ffn")))

    guide = SearchGuide(evaluator=evaluator, evaluations=3)
    found = search(GRAPH, SCORES, budget_for_ratio(GRAPH, 0.1), space(), Strategy.ADAPTIVE, guide)
    assert found.trail[0].name.startswith("uniform, attention 1,")  # half of that share is not yet a head
    assert all(one not in measured[:place] for place, one in enumerate(measured))
    assert len(measured) <= 3


@pytest.mark.parametrize(("costly", "evaluations"), [(range(8), 12), (range(7, 15), 12), (range(5, 10), 32)], ids=str)
def test_an_evolution_takes_less_where_it_costs_more(costly: range, evaluations: int) -> None:
    deep = graph(15)

    def of_costly(keep) -> int:
        return sum(CHANNELS - len(keep.get(f"layers.{layer}.ffn", range(CHANNELS))) for layer in costly)

    def evaluator(keep, dropped) -> np.ndarray:
        of_attention = any(name.endswith("attention") and len(left) < HEADS for name, left in keep.items())
        return np.full(2, 1.0 + of_costly(keep) + 1000 * of_attention)

    def found(evaluations: int):
        guide = SearchGuide(evaluator=evaluator, evaluations=evaluations)
        return search(deep, scores(deep), budget_for_ratio(deep, 0.2), space(), Strategy.ADAPTIVE, guide)

    before, after = found(4), found(evaluations)
    assert after.trail[0].name.startswith("evolution")
    assert of_costly(after.keep) < of_costly(before.keep)
    assert after.trail[0].loss == min(one.loss for one in after.trail)
    assert len(after.trail) <= evaluations
    assert found(evaluations) == after


def test_blocks_are_dropped_by_measured_loss() -> None:
    def evaluator(keep, dropped) -> np.ndarray:
        return np.array([0.0 if dropped == (3,) else 1.0 + sum(dropped)])

    budget, guide = budget_for_ratio(GRAPH, 0.3), SearchGuide(evaluator=evaluator)
    alone = search(GRAPH, SCORES, budget, space(roles=(PrunableRole.BLOCK,)), Strategy.ADAPTIVE, guide)
    assert alone.dropped_blocks == (0, 3)
    assert GRAPH.block_parameters - alone.block_parameters >= budget.removal
    mixed = search(
        GRAPH,
        SCORES,
        budget,
        space(roles=(PrunableRole.BLOCK, PrunableRole.FFN)),
        Strategy.UNIFORM,
        guide,
    )
    assert mixed.dropped_blocks == (3,)
    assert not any(name.startswith("layers.3.") for name in mixed.keep)
    assert GRAPH.block_parameters - mixed.block_parameters >= budget.removal


def test_roles_and_blocks_without_scores_are_named() -> None:
    ffn = {name: score for name, score in SCORES.items() if name.endswith("ffn")}
    budget = budget_for_ratio(GRAPH, 0.2)
    with pytest.raises(ConfigurationError, match=r"roles attention, hidden\. Estimate with these roles too"):
        search(GRAPH, ffn, budget, space(roles=(*FFN_AND_ATTENTION, PrunableRole.HIDDEN)), Strategy.UNIFORM)
    blocks = space(roles=(PrunableRole.BLOCK,))
    with pytest.raises(ConfigurationError, match=r"blocks 0, 1, 2, 3, 4, 5\. Estimate with the roles attention, ffn"):
        search(GRAPH, {}, budget, blocks, Strategy.UNIFORM)
    assert search(GRAPH, ffn, budget, blocks, Strategy.UNIFORM).dropped_blocks
    assert search(GRAPH, {}, Budget(removal=0), blocks, Strategy.UNIFORM).removes_nothing(GRAPH)


def test_a_block_is_worth_the_sum_of_its_units() -> None:
    def worth(layer: int, ffn: float, attention: float) -> dict[str, UnitScores]:
        means = {f"layers.{layer}.ffn": np.full(CHANNELS, ffn), f"layers.{layer}.attention": np.full(HEADS, attention)}
        return {name: UnitScores(mean=mean, variance=np.zeros_like(mean)) for name, mean in means.items()}

    # Block 2 has the smallest sum, 32 + 40. The others have 64 + 12, but a smaller mean of their groups' means.
    all_scores = {name: one for layer in range(6) for name, one in worth(layer, 1.0, 3.0).items()}
    blocks, small = space(roles=(PrunableRole.BLOCK,)), Budget(removal=1)
    plan = search(GRAPH, all_scores | worth(2, 0.5, 10.0), small, blocks, Strategy.UNIFORM)
    assert plan.dropped_blocks == (2,)


@pytest.mark.parametrize("roles", [("hidden",), ("hidden", "ffn"), ("hidden", "ffn", "block")])
def test_hidden_channels_count_exactly(roles) -> None:
    budget = budget_for_ratio(GRAPH, 0.25)
    of = space(roles=tuple(PrunableRole(role) for role in roles), align=2)
    plan = search(GRAPH, SCORES, budget, of, Strategy.UNIFORM)
    shapes = KeepIndex.of(GRAPH, plan.keep, plan.dropped_blocks).shapes
    inside = {name: shape for name, shape in shapes.items() if name.startswith("blocks.")}
    assert plan.block_parameters == count_parameters(inside)
    assert GRAPH.block_parameters - plan.block_parameters >= budget.removal


def test_targets_in_parameters_and_bytes() -> None:
    total = GRAPH.parameters
    plan = search(GRAPH, SCORES, budget_for_parameters(GRAPH, int(0.8 * total)), space(align=4), Strategy.UNIFORM)
    assert plan.parameters <= int(0.8 * total)
    target = 2 * int(0.8 * total) + header_bytes(GRAPH.shapes)
    plan = search(GRAPH, SCORES, budget_for_bytes(GRAPH, target, 2), space(align=4), Strategy.UNIFORM)
    assert 2 * plan.parameters + header_bytes(GRAPH.shapes) <= target
    for bad in (0, total + 1):
        with pytest.raises(TargetError):
            budget_for_parameters(GRAPH, bad)
    least, full = header_bytes(GRAPH.shapes) + 2, header_bytes(GRAPH.shapes) + 2 * total
    for size in (10, least - 1, full + 1):
        with pytest.raises(TargetError, match=f"Give a size from {least:,} to {full:,} bytes"):
            budget_for_bytes(GRAPH, size, 2)
    assert budget_for_bytes(GRAPH, least, 2).removal == total - 1
    with pytest.raises(TargetError):
        budget_for_ratio(GRAPH, 1.0)


def edited(dropped: tuple[int, ...] = (), **entries: dict[str, Any]) -> PlanDocument:
    groups = {f"layers.{name[1:]}.ffn": entry for name, entry in entries.items()}
    return PlanDocument.model_validate({"format_version": 1, "dropped_blocks": dropped, "groups": groups})


def test_edited_plan() -> None:
    plan = complete_plan(GRAPH, edited(_1={"kept": 40}, _2={"units": "1,3,5"}), SCORES)
    assert plan.keep["layers.2.ffn"] == (1, 3, 5)
    best = np.sort(np.argsort(SCORES["layers.1.ffn"].mean, kind="stable")[-40:])
    assert plan.keep["layers.1.ffn"] == tuple(best.tolist())
    wrong = (edited(_9={"kept": 3}), edited(_1={"kept": 65}), edited(_1={"units": "64"}), edited(dropped=(6,)))
    for document in wrong:
        with pytest.raises(ValueError, match=r"no such group|kept 65 of 64|64|no block 6"):
            complete_plan(GRAPH, document, SCORES)


def test_a_plan_of_everything_removes_nothing() -> None:
    assert make_plan(GRAPH, {}, (), layout=Layout.ADAPTIVE, strategy="uniform", align=1).removes_nothing(GRAPH)
    assert search(GRAPH, SCORES, Budget(removal=0), space(), Strategy.ADAPTIVE).removes_nothing(GRAPH)


def test_decrements_of_a_variable_come_in_order_whatever_their_cost() -> None:
    variables = build_variables(GRAPH, space((PrunableRole.FFN,), align=16))
    large, small = (SearchProblem(GRAPH, variables, SCORES, Budget(removal=removal)) for removal in (5000, 500))
    sizes = large.sizes(large.by_score(lambda name: np.sort(SCORES[name].mean)))
    assert all(size % 16 == 0 for size in sizes)
    assert small.sizes(small.by_share([1, 0, 0, 0, 0, 0]))[1:] == (64,) * 5


def test_modules_of_different_size_have_no_uniform_size() -> None:
    small = GRAPH.groups[1]
    import dataclasses

    other = dataclasses.replace(GRAPH, groups=(*GRAPH.groups[2:], dataclasses.replace(small, units=32)))
    with pytest.raises(TargetError, match="adaptive"):
        build_variables(other, space((PrunableRole.FFN,), Layout.UNIFORM, align=1))
    assert isinstance(SCORES["hidden"], UnitScores)
