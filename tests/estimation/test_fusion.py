from __future__ import annotations

import numpy as np
import pytest

from saap.core.errors import StaleInputError
from saap.core.records import CoupledGroup, GroupScores, ImportanceScores, ModelGraph, ModelRef, Role
from saap.estimation.fusion import closed_form_sigma, fuse, fused, learned_sigma
from saap.settings.prune import FusionScope

SAMPLES = 6


def two_layer_graph() -> ModelGraph:
    groups = tuple(
        CoupledGroup(layer=layer, role=role, name=f"layers.{layer}.{role}", units=units, members=())
        for layer in range(2)
        for role, units in ((Role.FFN, 5), (Role.ATTENTION, 3))
    )
    ref = ModelRef(source="none", config_digest="c", weights_digest="w")
    return ModelGraph(model=ref, blocks=("layers.0", "layers.1"), groups=groups, shapes={})


def group_scores(vector: np.ndarray, element: np.ndarray) -> GroupScores:
    v, e = vector - vector.mean(0), element - element.mean(0)
    return GroupScores(
        vector=vector.mean(0),
        vector_m2=(v * v).sum(0),
        element=element.mean(0),
        element_m2=(e * e).sum(0),
        comoment=(v * e).sum(0),
    )


def random_scores(graph: ModelGraph) -> tuple[ImportanceScores, dict[str, tuple[np.ndarray, np.ndarray]]]:
    random = np.random.default_rng(0)
    drawn = {
        group.name: (
            random.random((SAMPLES, group.units)) * 10.0 ** (-group.layer - 3),
            random.random((SAMPLES, group.units)) * 10.0 ** (3 * group.layer),
        )
        for group in graph.groups
    }
    scores = ImportanceScores(
        graph_digest=graph.digest,
        calibration_digest="",
        samples=SAMPLES,
        element_order="2",
        aggregation="sum",
        losses=np.zeros(SAMPLES),
        groups={name: group_scores(*pair) for name, pair in drawn.items()},
    )
    return scores, drawn


@pytest.mark.parametrize("scale", [1e-14, 1e-3, 1.0, 1e6, 1e12])
def test_learned_sigma_is_the_closed_form(scale: float) -> None:
    importances = np.random.default_rng(0).random(40) * scale
    assert learned_sigma(importances) == pytest.approx(closed_form_sigma(importances), rel=1e-10)


def test_closed_form_is_the_least_of_the_objective() -> None:
    importances = np.array([0.2, 3.0, 1.3])
    sigma = closed_form_sigma(importances)

    def objective(s: float) -> float:
        return float(importances.mean() / (2 * s**2) + np.log(s))

    assert objective(sigma) < min(objective(sigma * 0.99), objective(sigma * 1.01))
    assert sigma**2 == pytest.approx(1.5)


@pytest.mark.parametrize("scope", FusionScope)
def test_both_methods_give_the_same_scores(scope: FusionScope) -> None:
    graph = two_layer_graph()
    scores, _ = random_scores(graph)
    closed, learned = fuse(scores, graph, scope), fuse(scores, graph, scope, learned_sigma)
    for name, unit in closed.items():
        np.testing.assert_allclose(learned[name].mean, unit.mean, rtol=1e-9)
        np.testing.assert_allclose(learned[name].variance, unit.variance, rtol=1e-9)


@pytest.mark.parametrize("scope", FusionScope)
def test_scope_and_variance_from_the_definition(scope: FusionScope) -> None:
    graph = two_layer_graph()
    scores, drawn = random_scores(graph)
    shares = {
        FusionScope.GLOBAL: lambda a, b: True,
        FusionScope.ROLE: lambda a, b: a.role == b.role,
        FusionScope.LAYER: lambda a, b: a.layer == b.layer,
        FusionScope.LAYER_ROLE: lambda a, b: a.name == b.name,
    }[scope]
    for group in graph.groups:
        others = [drawn[other.name] for other in graph.groups if shares(group, other)]
        v2, e2 = (np.concatenate([pair[i].mean(0) for pair in others]).mean() for i in (0, 1))
        vector, element = drawn[group.name]
        per_sample = np.sqrt(v2 * e2) * (vector / (2 * v2) + element / (2 * e2))
        found = fuse(scores, graph, scope)[group.name]
        np.testing.assert_allclose(found.mean, per_sample.mean(0), rtol=1e-9)
        np.testing.assert_allclose(found.variance, per_sample.var(0, ddof=1), rtol=1e-9)


def test_a_scope_of_zeros_ranks_last_without_nan() -> None:
    zero = np.zeros(4)
    scores = GroupScores(vector=zero, vector_m2=zero, element=zero, element_m2=zero, comoment=zero)
    sigma = closed_form_sigma(zero)
    assert learned_sigma(zero) == pytest.approx(sigma, rel=1e-9)
    result = fused(scores, sigma, sigma, SAMPLES)
    assert (result.mean == 0).all()
    assert (result.variance == 0).all()


def test_the_order_is_that_of_the_minimised_sum() -> None:
    """Inside a scope, and that of the means of whole scopes."""
    graph = two_layer_graph()
    scores, _ = random_scores(graph)
    means = []
    for name, unit in fuse(scores, graph, FusionScope.LAYER_ROLE).items():
        one = scores.groups[name]
        vector, element = closed_form_sigma(one.vector), closed_form_sigma(one.element)
        summed = one.vector / (2 * vector**2) + one.element / (2 * element**2) + np.log(vector) + np.log(element)
        np.testing.assert_array_equal(np.argsort(unit.mean), np.argsort(summed))
        means.append((unit.mean.mean(), summed.mean()))
    fused_means, summed_means = np.array(means).T
    np.testing.assert_array_equal(np.argsort(fused_means), np.argsort(summed_means))
    assert summed_means.min() < 0 < fused_means.min()


def test_scores_of_another_graph_are_refused() -> None:
    graph = two_layer_graph()
    scores, _ = random_scores(graph)
    other = ModelGraph(model=graph.model, blocks=("layers.0",), groups=graph.groups[:2], shapes={})
    with pytest.raises(StaleInputError, match=other.digest[:12]):
        fuse(scores, other)
