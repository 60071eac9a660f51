"""What whole modules are worth decides how much each gives: a module of no use gives most, whatever the strategy."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tests.pipeline import tiny
from tests.structure_search.synthetic import graph

import saap
from saap.core.errors import ConfigurationError
from saap.core.records import GroupScores, ImportanceScores, ModelGraph, Role
from saap.estimation.estimate import unit_scores
from saap.estimation.fusion import fuse
from saap.settings.prune import FusionScope, PrunableRole
from saap.settings.registry import Importance, Strategy
from saap.structure_search.plan import SearchSpace, build_variables
from saap.structure_search.strategies import module_importance, module_shares

RANKING = {Strategy.IMPORTANCE: 0.04, Strategy.VOLATILITY_Z: 0.1, Strategy.VOLATILITY_CV: 0.1}
"""By strategy, a ratio at which modules of few units differ in what they give."""
EVERYWHERE = (0, 0)
IRRELEVANT = 2
SAMPLES = 8


def drawn(of: ModelGraph, scale: dict[str, float], seed: int = 0) -> ImportanceScores:
    """Scores far below one nat, as those of real models are, so that the logarithms of the uncertainties are negative.

    scale: by group, what its importances are multiplied by.
    """
    generator = np.random.default_rng(seed)

    def one(units: int, factor: float) -> GroupScores:
        vector, element = (factor * 1e-6 * (0.5 + generator.random((SAMPLES, units))) for _ in range(2))
        v, e = vector - vector.mean(0), element - element.mean(0)
        return GroupScores(
            vector=vector.mean(0), vector_m2=(v * v).sum(0), element=element.mean(0), element_m2=(e * e).sum(0),
            comoment=(v * e).sum(0),
        )  # fmt: skip

    return ImportanceScores(
        graph_digest=of.digest, calibration_digest="", samples=SAMPLES, element_order="2", aggregation="sum",
        losses=np.zeros(SAMPLES),
        groups={group.name: one(group.units, scale.get(group.name, 1.0)) for group in of.groups if group.layer >= 0},
    )  # fmt: skip


def given(plan: saap.StructurePlan, of: ModelGraph, role: Role) -> dict[int, float]:
    """Share of its units that each module of a role gives, by layer."""
    return {group.layer: 1 - len(plan.kept(group)) / group.units for group in of.of_role(role)}


@pytest.mark.parametrize("strategy", RANKING)
@pytest.mark.parametrize("role", [Role.FFN, Role.ATTENTION])
def test_the_least_important_module_gives_most(strategy: Strategy, role: Role) -> None:
    of = graph()
    name = f"layers.{IRRELEVANT}.{role}"
    plan = saap.search(
        of, replace(drawn(of, {name: 1e-3}), element_order="token-fisher"), pruning_ratio=RANKING[strategy],
        strategy=strategy, roles=(role.value,), skip_layers=EVERYWHERE, align=1,
    )  # fmt: skip
    shares = given(plan, of, role)
    assert shares[IRRELEVANT] > max(share for layer, share in shares.items() if layer != IRRELEVANT)


@pytest.mark.parametrize("scope", FusionScope)
def test_one_ranking_compares_roles_by_what_their_parameters_are_worth(scope: FusionScope) -> None:
    of = graph()
    ranked = partial(
        saap.search, of, pruning_ratio=0.1, strategy="importance", importance="fused", fusion_scope=scope,
        skip_layers=EVERYWHERE, align=1,
    )  # fmt: skip
    scores = drawn(of, {f"layers.{layer}.attention": 1e-3 for layer in range(6)})
    plan = ranked(scores)
    heads, channels = (
        sum(group.units - len(plan.kept(group)) for group in of.of_role(role)) for role in (Role.ATTENTION, Role.FFN)
    )
    assert heads > 0
    assert channels == 0
    # with attention as valuable as it is rare, channels go before it
    scores = drawn(of, {f"layers.{layer}.attention": 1e3 for layer in range(6)})
    plan = ranked(scores)
    assert {of.group(name).role for name in plan.keep} == {Role.FFN}


@pytest.mark.parametrize("importance", Importance)
@pytest.mark.parametrize("scope", FusionScope)
def test_modules_rank_as_their_importances_do(importance: Importance, scope: FusionScope) -> None:
    of = graph()
    scales = {f"layers.{layer}.ffn": 10.0**-layer for layer in range(6)}
    units = unit_scores(drawn(of, scales), of, importance, scope)
    variables = build_variables(of, SearchSpace(roles=(PrunableRole.FFN,), layout=saap.Layout.ADAPTIVE, align=1))
    worth = module_importance(variables, units)
    assert (worth > 0).all()
    assert (np.diff(worth) < 0).all()
    assert (np.diff(module_shares(variables, units)) > 0).all()


@pytest.mark.parametrize("scope", FusionScope)
def test_the_fused_score_is_positive_and_scales_with_the_importances(scope: FusionScope) -> None:
    of = graph()
    scores = drawn(of, {})
    small, large = (
        fuse(dataclasses.replace(scores, groups={n: scaled(g, factor) for n, g in scores.groups.items()}), of, scope)
        for factor in (1.0, 1e9)
    )
    for name, unit in small.items():
        assert (unit.mean > 0).all()
        np.testing.assert_allclose(large[name].mean, 1e9 * unit.mean, rtol=1e-9)
        np.testing.assert_allclose(large[name].variance, 1e18 * unit.variance, rtol=1e-9)


def scaled(of: GroupScores, factor: float) -> GroupScores:
    return GroupScores(
        vector=factor * of.vector, vector_m2=factor**2 * of.vector_m2, element=factor * of.element,
        element_m2=factor**2 * of.element_m2, comoment=factor**2 * of.comoment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "effort"), [*((strategy, "fast") for strategy in RANKING), ("adaptive", "default")]
)
@pytest.mark.parametrize(
    ("role", "ratio", "output"), [("ffn", 0.2, "mlp.down_proj"), ("attention", 0.03, "self_attn.o_proj")]
)
def test_a_layer_that_does_nothing_loses_most(strategy: str, effort: str, role: str, ratio: float, output: str) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[IRRELEVANT].get_submodule(output).weight *= 1e-2
    text = np.random.default_rng(0).integers(2, tiny.VOCABULARY, (64, 128))
    found = saap.prune(
        model, pruning_ratio=ratio, calibration=text, samples=16, sample_length=32, align=8,
        strategy=strategy, roles=(role,), skip_layers=EVERYWHERE, restore=False, effort=effort,
    )  # fmt: skip
    shares = given(found.plan, saap.discover(model), Role(role))
    assert shares[IRRELEVANT] > max(share for layer, share in shares.items() if layer != IRRELEVANT)


@pytest.mark.parametrize(("measured", "importance"), [("2", "token-fisher"), ("token-fisher", "fused")])
def test_scores_of_another_importance_are_refused(measured: str, importance: str) -> None:
    of = graph()
    scores = replace(drawn(of, {}), element_order=measured)
    with pytest.raises(ConfigurationError, match=f"estimated with the importance {measured}, not {importance}"):
        saap.search(of, scores, pruning_ratio=0.2, strategy="uniform", importance=importance)
