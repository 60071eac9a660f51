"""The table of baselines: what scores a unit, which rule shares the budget, where pruning is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from saap.baselines.activations import (
    ActivationStatistics,
    activation_statistics,
    flap_scores,
    influence_scores,
    wanda_scores,
)
from saap.baselines.llm_pruner import Taylor, WeightGradients, taylor_scores, weight_gradients
from saap.baselines.weights import magnitude_scores, random_scores
from saap.core.records import FloatArray
from saap.models.walk.backend import Backend
from saap.settings.prune import Method, PrunableRole, SkipLayers, Strategy

Scores = Mapping[str, FloatArray]


class Measurements:
    """What the baselines want to know of a dense model; each pass over the text is made once, when it is first needed.

    tokens: (samples, length) ids, the same as the method under test calibrates on.
    """

    def __init__(self, backend: Backend, tokens: Tensor, *, seed: int = 0) -> None:
        self.backend, self.tokens, self.seed = backend, tokens, seed
        self.model, self.graph = backend.model, backend.graph

    @cached_property
    def gradients(self) -> WeightGradients:
        """Gradients of the weights, for all of LLM-Pruner's importances."""
        return weight_gradients(self.backend, self.tokens)

    @cached_property
    def activations(self) -> ActivationStatistics:
        """Statistics of the activations, for Wanda-sp, FLAP and block influence."""
        return activation_statistics(self.backend, self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One published method.

    scores: units of low score are removed first. strategy: how the budget is shared. skip_layers: None protects the
    ends as LLM-Pruner does (4 first and 2 last of 30). roles: None leaves them to the caller. compensates: by FLAP's
    biases. needs: what of the measurements, for their timing.
    """

    scores: Callable[[Measurements], Scores]
    strategy: Strategy = Strategy.UNIFORM
    skip_layers: SkipLayers | None = None
    roles: tuple[PrunableRole, ...] | None = None
    compensates: bool = False
    needs: Literal["gradients", "activations"] | None = None


def _taylor(kind: Taylor) -> Baseline:
    return Baseline(
        scores=lambda found: taylor_scores(found.model, found.graph, found.gradients, kind), needs="gradients"
    )


BASELINES: Mapping[Method, Baseline] = {
    Method.RANDOM: Baseline(scores=lambda found: random_scores(found.graph, found.seed)),
    Method.MAGNITUDE: Baseline(scores=lambda found: magnitude_scores(found.model, found.graph)),
    Method.LLM_PRUNER_VECTOR: _taylor(Taylor.VECTOR),
    Method.LLM_PRUNER_ELEMENT1: _taylor(Taylor.ELEMENT1),
    Method.LLM_PRUNER_ELEMENT2: _taylor(Taylor.ELEMENT2),
    Method.LLM_PRUNER_MIXED: _taylor(Taylor.MIXED),
    Method.WANDA_SP: Baseline(
        scores=lambda found: wanda_scores(found.model, found.graph, found.activations),
        skip_layers=SkipLayers(),
        needs="activations",
    ),
    Method.FLAP: Baseline(
        scores=lambda found: flap_scores(found.model, found.graph, found.activations),
        strategy=Strategy.IMPORTANCE,
        skip_layers=SkipLayers(),
        compensates=True,
        needs="activations",
    ),
    Method.BLOCK_INFLUENCE: Baseline(
        scores=lambda found: influence_scores(found.graph, found.activations),
        skip_layers=SkipLayers(),
        roles=(PrunableRole.BLOCK,),
        needs="activations",
    ),
}
