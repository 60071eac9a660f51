"""The groups of a plan and what their scores say: before and after fusion, fluctuation against importance."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saap.core.errors import EvaluationError, PlanError
from saap.core.records import CoupledGroup, FloatArray, ImportanceScores, ModelGraph, ModelRef, Role, UnitScores
from saap.core.storage import STATISTICS, PlanDocument, parse_units, read_scores
from saap.estimation.fusion import fuse
from saap.settings.prune import FusionScope

LARGEST = 1e100
"""Scores below this can be fused and drawn."""
Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]
Agreement = dict[str, float | None]
"""How far the orders of one module's units agree.

`a ~ b`: Spearman's rank correlation. `fused, not a`: share of the removed units that would be others if as many were
removed by score `a` alone; None where nothing is removed.
"""
_PLACE = re.compile(rf"(layers\.(?P<layer>[0-9]{{1,6}})\.)?(?P<role>{'|'.join(Role)})(\.|$)", re.ASCII)


@dataclass(frozen=True, slots=True)
class PlanGroup:
    """A group of a plan that can be shown. layer: -1 for the whole model's. units: the kept ones, as runs."""

    layer: int
    role: str
    kept: int
    of: int
    units: str | None


def plan_groups(plan: PlanDocument, file: Path) -> dict[str, PlanGroup]:
    """The groups by name, "layers.3.ffn" or "hidden". Raises PlanError for what is no group of a written plan."""
    found = {}
    for name, entry in plan.groups.items():
        place = _PLACE.match(name)
        if place is None or entry.kept is None or entry.of is None or entry.kept > entry.of:
            raise PlanError(
                f"{file} has a group {name[:60]!r} that no run has written", "Use the folder as `saap prune` wrote it"
            )
        found[name] = PlanGroup(int(place["layer"] or -1), place["role"], entry.kept, entry.of, entry.units)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """Scores of one module's units, all (units,).

    vector, element, fused: importance. fluctuation: variance over samples of the fused score. kept: True for units
    that are kept.
    """

    layer: int
    role: str
    vector: FloatArray
    element: FloatArray
    fused: FloatArray
    fluctuation: FloatArray
    kept: Mask


def read_views(file: Path, groups: Mapping[str, PlanGroup], scope: str) -> list[GroupView]:
    """The scores of every module that can be pruned, fused as the run fused them. scope: a FusionScope by its name.

    Raises EvaluationError for scores that do not fit the plan, or cannot be shown.
    """
    scores = read_scores(file)
    try:
        kept = {name: _kept(scores, name, group) for name, group in groups.items() if name in scores.groups}
        fused = _fused(scores, {name: groups[name] for name in kept if groups[name].layer >= 0}, FusionScope(scope))
    except ValueError as error:
        raise EvaluationError(
            f"{file} does not fit the plan and the manifest next to it ({error})", "Use the folder as it was written"
        ) from None
    return [
        GroupView(
            layer=groups[name].layer, role=groups[name].role, vector=scores.groups[name].vector,
            element=scores.groups[name].element, fused=unit.mean, fluctuation=unit.variance, kept=kept[name],
        )
        for name, unit in fused.items()
    ]  # fmt: skip


def _fused(scores: ImportanceScores, groups: Mapping[str, PlanGroup], scope: FusionScope) -> dict[str, UnitScores]:
    """The fusion of the run, in the order of the groups."""
    scored = tuple(
        CoupledGroup(layer=group.layer, role=Role(group.role), name=name, units=group.of, members=())
        for name, group in groups.items()
    )
    model = ModelRef(source="", config_digest="", weights_digest="")
    graph = ModelGraph(model=model, blocks=(), groups=scored, shapes={})
    samples = max(scores.samples, 2)  # of one sample there is no spread, which is then 0
    found = fuse(dataclasses.replace(scores, graph_digest=graph.digest, samples=samples), graph, scope)
    return {name: found[name] for name in groups}


def _kept(scores: ImportanceScores, name: str, group: PlanGroup) -> Mask:
    """Which units of a group are kept, (units,). Raises ValueError where that, or its scores, cannot be known."""
    arrays = [getattr(scores.groups[name], statistic) for statistic in STATISTICS]
    if len(arrays[0]) != group.of or group.units is None:
        raise ValueError(f"{name} has scores of {len(arrays[0])} units")
    if not all(np.abs(array).max(initial=0) < LARGEST for array in arrays):  # also where one is no number
        raise ValueError(f"{name} has scores that are no finite numbers")
    kept = np.zeros(group.of, dtype=bool)
    kept[list(parse_units(group.units, group.of))] = True
    return kept


def spearman(first: FloatArray, second: FloatArray) -> float:
    """Rank correlation, equal values sharing their rank; NaN where one side is constant."""
    ranks = []
    for values in (first, second):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
        if len(counts) == 1:
            return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def agreement(view: GroupView) -> Agreement:
    """Rank agreement of a module's scores, and how many units change sides by the fusion."""
    count = int((~view.kept).sum())

    def changed_from(values: FloatArray) -> float | None:
        removed, others = (set(np.argsort(one, kind="stable")[:count].tolist()) for one in (view.fused, values))
        return len(removed - others) / count if count else None

    return {
        "vector ~ element": spearman(view.vector, view.element),
        "vector ~ fused": spearman(view.vector, view.fused),
        "element ~ fused": spearman(view.element, view.fused),
        "fused, not vector": changed_from(view.vector),
        "fused, not element": changed_from(view.element),
    }
