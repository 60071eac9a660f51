"""The one score per unit that search uses."""

from __future__ import annotations

from collections.abc import Mapping

from saap.core.records import ImportanceScores, ModelGraph, UnitScores
from saap.estimation.fusion import fuse
from saap.settings.prune import FusionScope, Importance


def unit_scores(
    scores: ImportanceScores, graph: ModelGraph, importance: Importance, scope: FusionScope
) -> Mapping[str, UnitScores]:
    """Mean and variance over samples of the chosen importance, by group.

    `vector` and the element-wise importances are taken as estimated (the estimation was run for their order); `fused`
    fuses both over `scope`.
    """
    if importance is Importance.FUSED:
        return fuse(scores, graph, scope)
    freedom = max(scores.samples - 1, 1)
    chosen = {}
    for name, group in scores.groups.items():
        vector = importance is Importance.VECTOR
        mean, m2 = (group.vector, group.vector_m2) if vector else (group.element, group.element_m2)
        chosen[name] = UnitScores(mean=mean, variance=m2 / freedom)
    return chosen
