"""What the scores of a run say: before and after fusion, fluctuation against importance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saap.core.errors import EvaluationError
from saap.core.records import FloatArray, ImportanceScores
from saap.core.storage import STATISTICS, parse_units, read_scores
from saap.estimation.fusion import closed_form_sigma, fused
from saap.reporting.inputs import PlanGroup
from saap.settings.prune import FusionScope

LARGEST = 1e100
"""Scores below this can be fused and drawn."""
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """Scores of one module's units, all (units,).

    vector, element, fused: importance. fluctuation: variance over samples of the fused score. kept: True for units
    that stay.
    """

    name: str
    layer: int
    role: str
    vector: FloatArray
    element: FloatArray
    fused: FloatArray
    fluctuation: FloatArray
    kept: Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far the orders of one module's units agree.

    vector_element, vector_fused, element_fused: Spearman's rank correlation. changed, changed_from_vector: share of the
    removed units that would be others if as many were removed by `element` (or by `vector`) alone instead of `fused`.
    """

    vector_element: float
    vector_fused: float
    element_fused: float
    changed: float | None
    changed_from_vector: float | None


def read_views(file: Path, groups: Mapping[str, PlanGroup], scope: str) -> list[GroupView]:
    """The scores of every module that can be pruned, fused as the run fused them. scope: a FusionScope by its name.

    Raises EvaluationError for scores that do not fit the plan, or cannot be shown.
    """
    scores = read_scores(file)
    try:
        key = _SCOPE_KEYS[FusionScope(scope)]
        kept = {name: _kept(scores, name, group) for name, group in groups.items() if name in scores.groups}
    except ValueError as error:
        raise EvaluationError(
            f"{file} does not fit the plan and the manifest beside it ({error})", "Use the folder as it was written"
        ) from None
    shared: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in kept:
        if groups[name].layer >= 0:
            shared[tuple(getattr(groups[name], part) for part in key)].append(name)
    views = {}
    for names in shared.values():
        vector, element = (
            closed_form_sigma(np.concatenate([getattr(scores.groups[name], kind) for name in names]))
            for kind in ("vector", "element")
        )
        for name in names:
            found, group = scores.groups[name], groups[name]
            unit = fused(found, vector, element, max(scores.samples, 2))
            views[name] = GroupView(
                name=name, layer=group.layer, role=group.role, vector=found.vector, element=found.element,
                fused=unit.mean, fluctuation=unit.variance, kept=kept[name],
            )  # fmt: skip
    return [views[name] for name in kept if name in views]


_SCOPE_KEYS: Mapping[FusionScope, tuple[str, ...]] = {
    FusionScope.GLOBAL: (), FusionScope.ROLE: ("role",), FusionScope.LAYER: ("layer",),
    FusionScope.LAYER_ROLE: ("layer", "role"),
}  # fmt: skip


def _kept(scores: ImportanceScores, name: str, group: PlanGroup) -> Mask:
    """Which units of a group stay, (units,). Raises ValueError where that, or its scores, cannot be known."""
    arrays = [getattr(scores.groups[name], statistic) for statistic in STATISTICS]
    if len(arrays[0]) != group.of or group.units is None:
        raise ValueError(f"{name} has scores of {len(arrays[0])} units")
    if not all(np.abs(array).max(initial=0) < LARGEST for array in arrays):  # also where one is no number
        raise ValueError(f"{name} has scores that are no finite numbers")
    kept = np.zeros(group.of, dtype=bool)
    kept[list(parse_units(group.units, group.of))] = True
    return kept


def ranks(values: FloatArray) -> FloatArray:
    """Average ranks from 1, equal values sharing theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    result: FloatArray = (last - (counts - 1) / 2)[inverse]
    return result


def spearman(first: FloatArray, second: FloatArray) -> float:
    """Rank correlation; NaN where one side is constant."""
    one, other = ranks(first), ranks(second)
    if one.std() == 0 or other.std() == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def agreement(view: GroupView) -> Agreement:
    """Rank agreement of a module's scores, and how many units change sides by the fusion."""
    count = int((~view.kept).sum())

    def removed(values: FloatArray) -> set[int]:
        return set(np.argsort(values, kind="stable")[:count].tolist())

    def changed_from(values: FloatArray) -> float | None:
        return len(removed(view.fused) - removed(values)) / count if count else None

    return Agreement(
        vector_element=spearman(view.vector, view.element),
        vector_fused=spearman(view.vector, view.fused),
        element_fused=spearman(view.element, view.fused),
        changed=changed_from(view.element),
        changed_from_vector=changed_from(view.vector),
    )
