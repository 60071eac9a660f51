"""Scores of a plan's groups: before and after fusion, fluctuation against importance."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from saap.core.errors import EvaluationError, PlanError
from saap.core.records import CoupledGroup, FloatArray, ImportanceScores, ModelGraph, ModelRef, Role
from saap.core.storage import STATISTICS, PlanDocument, parse_units, read_scores
from saap.estimation.fusion import fuse
from saap.settings.prune import FusionScope

LARGEST = 1e100
"""Limit on scores that are fused and drawn."""
_PLACE = re.compile(rf"(layers\.(?P<layer>[0-9]{{1,6}})\.)?(?P<role>{'|'.join(Role)})(\.|$)", re.ASCII)


@dataclass(frozen=True, slots=True)
class PlanGroup:
    """A group of a plan. layer: -1 for the whole model's. units: the kept ones, as runs."""

    layer: int
    role: str
    kept: int
    of: int
    units: str | None


def plan_groups(plan: PlanDocument, file: Path) -> dict[str, PlanGroup]:
    """The groups by name, "layers.3.ffn" or "hidden". Raises PlanError for an unknown group."""
    found = {}
    for name, entry in plan.groups.items():
        place = _PLACE.match(name)
        if place is None or entry.kept is None or entry.of is None or entry.kept > entry.of:
            raise PlanError(
                f"{file} has a group {name[:60]!r} that saap does not write", "Use the folder as `saap prune` wrote it"
            )
        found[name] = PlanGroup(int(place["layer"] or -1), place["role"], entry.kept, entry.of, entry.units)
    return found


def by_layer(groups: Iterable[PlanGroup]) -> list[PlanGroup]:
    """One group for each role of a layer: experts, which have groups of their own, are added up."""
    found: dict[tuple[int, str], PlanGroup] = {}
    for group in groups:
        before = found.get((group.layer, group.role), PlanGroup(group.layer, group.role, 0, 0, None))
        kept, of = before.kept + group.kept, before.of + group.of
        found[group.layer, group.role] = dataclasses.replace(before, kept=kept, of=of)
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class ModuleScores:
    """Scores of the units of one role in a layer, all (units,); those of its experts one after another.

    vector, element, fused: importance. fluctuation: variance over samples of the fused score. kept: True for units
    that are kept.
    """

    layer: int
    role: str
    vector: FloatArray
    element: FloatArray
    fused: FloatArray
    fluctuation: FloatArray
    kept: np.ndarray[tuple[int], np.dtype[np.bool_]]

    @cached_property
    def agreement(self) -> dict[str, float | None]:
        """Agreement of the orders of the units.

        `a ~ b`: Spearman's rank correlation. `fused, not a`: share of the removed units that score `a` alone would keep
        at the same number; None if nothing is removed.
        """
        count = int((~self.kept).sum())
        scores = {"vector": self.vector, "element": self.element, "fused": self.fused}
        removed = {name: set(np.argsort(one, kind="stable")[:count].tolist()) for name, one in scores.items()}
        pairs = (("vector", "element"), ("vector", "fused"), ("element", "fused"))
        return {
            **{f"{one} ~ {other}": spearman(scores[one], scores[other]) for one, other in pairs},
            **{
                f"fused, not {name}": len(removed["fused"] - removed[name]) / count if count else None
                for name in ("vector", "element")
            },
        }


def read_modules(file: Path, groups: Mapping[str, PlanGroup], scope: str) -> list[ModuleScores]:
    """The scores of every role in every layer, fused as in the run. scope: name of a FusionScope.

    Raises EvaluationError for scores that do not fit the plan or are not finite.
    """
    scores = read_scores(file)
    try:
        kept = {name: _kept(scores, name, group) for name, group in groups.items() if name in scores.groups}
        fused = fuse(*_inside_blocks(scores, groups), FusionScope(scope))
    except ValueError as error:
        raise EvaluationError(
            f"{file} does not fit the plan and the manifest next to it ({error})", "Use the folder as it was written"
        ) from None
    places: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
    for name in (name for name in groups if name in fused):
        places[groups[name].layer, groups[name].role].append(name)
    return [
        ModuleScores(
            layer=layer, role=role, vector=np.concatenate([scores.groups[name].vector for name in names]),
            element=np.concatenate([scores.groups[name].element for name in names]),
            fused=np.concatenate([fused[name].mean for name in names]),
            fluctuation=np.concatenate([fused[name].variance for name in names]),
            kept=np.concatenate([kept[name] for name in names]),
        )
        for (layer, role), names in places.items()
    ]  # fmt: skip


def _inside_blocks(scores: ImportanceScores, groups: Mapping[str, PlanGroup]) -> tuple[ImportanceScores, ModelGraph]:
    """The scores for a graph with only the plan's groups of decoder blocks."""
    scored = tuple(
        CoupledGroup(layer=group.layer, role=Role(group.role), name=name, units=group.of, members=())
        for name, group in groups.items()
        if group.layer >= 0
    )
    model = ModelRef(source="", config_digest="", weights_digest="")
    graph = ModelGraph(model=model, blocks=(), groups=scored, shapes={})
    samples = max(scores.samples, 2)  # the variance of one sample is 0
    return dataclasses.replace(scores, graph_digest=graph.digest, samples=samples), graph


def _kept(scores: ImportanceScores, name: str, group: PlanGroup) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Mask of the kept units of a group, (units,). Raises ValueError for invalid units or scores."""
    arrays = [getattr(scores.groups[name], statistic) for statistic in STATISTICS]
    if len(arrays[0]) != group.of or group.units is None:
        raise ValueError(f"{name} has scores of {len(arrays[0])} units")
    if not all(np.abs(array).max(initial=0) < LARGEST for array in arrays):  # rejects NaN too
        raise ValueError(f"{name} has scores that are not finite")
    return np.isin(np.arange(group.of), parse_units(group.units, group.of))


def spearman(first: FloatArray, second: FloatArray) -> float:
    """Rank correlation with shared ranks of equal values; NaN if one side is constant."""
    ranks = []
    for values in (first, second):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
        if len(counts) == 1:
            return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
