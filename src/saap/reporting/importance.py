"""What the scores of a run say: before and after fusion, fluctuation against importance. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saap.core.records import FloatArray


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

    vector_element, vector_fused, element_fused: Spearman's rank correlation. changed, changed_from_vector: share of the
    removed units that would be others if as many were removed by `element` (or by `vector`) alone instead of `fused`.
    """

    name: str
    vector_element: float
    vector_fused: float
    element_fused: float
    changed: float | None
    changed_from_vector: float | None


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

    def leaving(values: FloatArray) -> set[int]:
        return set(np.argsort(values, kind="stable")[:removed].tolist())

    def changed_from(values: FloatArray) -> float | None:
        return len(leaving(view.fused) - leaving(values)) / removed if removed else None

    return Agreement(
        name=view.name,
        vector_element=spearman(view.vector, view.element),
        vector_fused=spearman(view.vector, view.fused),
        element_fused=spearman(view.element, view.fused),
        changed=changed_from(view.element),
        changed_from_vector=changed_from(view.vector),
    )


def mean_known(values: Sequence[float | None]) -> float | None:
    """Mean of what is a number."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else None


def by_layer(views: Sequence[GroupView], role: str) -> Mapping[int, GroupView]:
    """The modules of one role by layer."""
    return {view.layer: view for view in views if view.role == role}
