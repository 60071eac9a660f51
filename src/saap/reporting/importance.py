"""What the scores of a run say: before and after fusion, fluctuation against importance. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saap.records import FloatArray


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
    kept: np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far the orders of one module's units agree.

    vector_element, vector_fused, element_fused: Spearman's rank correlation. changed: share of the removed units that
    would be others if as many were removed by `element` alone instead of `fused`.
    """

    name: str
    vector_element: float
    vector_fused: float
    element_fused: float
    changed: float | None


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
    removed = int((~view.kept).sum())
    changed = None
    if removed:
        by_fused = set(np.argsort(view.fused, kind="stable")[:removed].tolist())
        by_element = set(np.argsort(view.element, kind="stable")[:removed].tolist())
        changed = len(by_fused - by_element) / removed
    return Agreement(
        name=view.name,
        vector_element=spearman(view.vector, view.element),
        vector_fused=spearman(view.vector, view.fused),
        element_fused=spearman(view.element, view.fused),
        changed=changed,
    )


def mean_known(values: Sequence[float | None]) -> float | None:
    """Mean of what is a number."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else None


def by_layer(views: Sequence[GroupView], role: str) -> Mapping[int, GroupView]:
    """The modules of one role by layer."""
    return {view.layer: view for view in views if view.role == role}
