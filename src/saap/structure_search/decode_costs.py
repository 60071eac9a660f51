"""What decoding costs: measured shares of the dense model's time, and budgets that follow from a requested speed-up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saap.core.errors import TargetError
from saap.core.records import ModelGraph, Role, StructurePlan

Point = tuple[float, float]
WHOLE = 10**9
"""Time of one decoding step of the dense model; whole numbers, so that sums do not depend on their order."""

LARGEST_CORRECTION = 0.15
FRACTIONS = (0.7, 0.4)
"""Of its units that every group of a role keeps in the trials, in addition to the least possible."""
FEW_UNITS = 4
"""Groups of so many units or fewer are tried at every number of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCosts:
    """Time of one decoding step (batch 1) that structures save, as shares of the dense model's.

    curves: by role, (fraction of units kept in every group, share saved), beginning with (1, 0); linear between.
    block: share saved with each whole block, None if that was not measured.
    """

    curves: Mapping[Role, tuple[Point, ...]]
    block: float | None = None

    def saved(self, role: Role, fraction: float) -> float:
        """Share saved when all groups of `role` keep this fraction of their units."""
        kept, shares = zip(*reversed(self.curves[role]), strict=True)
        return float(np.interp(fraction, kept, shares))


def curve_through(points: Sequence[Point]) -> tuple[Point, ...]:
    """A curve through measured points (fraction kept, share saved) in which whoever keeps less never saves less."""
    curve, least = [(1.0, 0.0)], 0.0
    for fraction, share in sorted(points, reverse=True):
        least = max(least, share)
        curve.append((fraction, least))
    return tuple(curve)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeBudget:
    """At least `removal` of the dense model's time for one decoding step must be saved, in billionths of it.

    savings: group -> what is saved when it keeps 0, 1, ... units. layers: of the groups. block: saved with each block.
    """

    removal: int
    savings: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, int]
    block: int = 0

    def removed(
        self, graph: ModelGraph, keep: Mapping[str, tuple[int, ...] | int], dropped_blocks: Iterable[int] = ()
    ) -> int:
        """Billionths of the time that this structure saves."""
        dropped = set(dropped_blocks)
        saved = len(dropped) * self.block
        for name, kept in keep.items():
            if name in self.savings and self.layers[name] not in dropped:
                saved += self.savings[name][kept if isinstance(kept, int) else len(kept)]
        return saved

    def speedup(self, graph: ModelGraph, plan: StructurePlan) -> float:
        """Predicted speed of the plan over that of the dense model."""
        return WHOLE / (WHOLE - self.removed(graph, plan.keep, plan.dropped_blocks))

    def unreachable(self, graph: ModelGraph, removed: int, how: str) -> TargetError:
        """The refusal of a budget of which at most `removed` can be reached."""
        requested, largest = WHOLE / (WHOLE - self.removal), WHOLE / (WHOLE - removed)
        return TargetError(
            f"a speed-up of {requested:.2f} cannot be reached {how}; the largest is {int(largest * 100) / 100:g}",
            "Ask for less, or allow more roles or layers",
        )


def budget_for_speedup(graph: ModelGraph, costs: DecodeCosts, speedup: float) -> TimeBudget:
    """Budget so that decoding is `speedup` times as fast as in the dense model, by the measured costs.

    What all groups of a role save together is divided among them by their units.
    """
    savings: dict[str, tuple[int, ...]] = {}
    for role in costs.curves:
        groups = graph.of_role(role)
        units = sum(group.units for group in groups)
        for group in groups:
            share = group.units / units
            savings[group.name] = tuple(
                round(WHOLE * share * costs.saved(role, kept / group.units)) for kept in range(group.units + 1)
            )
    layers = {group.name: group.layer for group in graph.groups}
    block = round(WHOLE * (costs.block or 0.0))
    return TimeBudget(removal=math.ceil(WHOLE * (1 - 1 / speedup)), savings=savings, layers=layers, block=block)


def corrected(budget: TimeBudget, *, predicted: float, measured: float) -> TimeBudget:
    """The budget with all savings scaled so that a plan whose speed-up was `predicted` gets the `measured` one.

    A measurement that is far off says more about other work on the machine than about the model, so the factor stays
    within LARGEST_CORRECTION of 1.
    """
    factor = (1 - 1 / measured) / (1 - 1 / predicted)
    factor = min(1 + LARGEST_CORRECTION, max(1 - LARGEST_CORRECTION, factor))
    savings = {name: tuple(round(factor * saved) for saved in found) for name, found in budget.savings.items()}
    return dataclasses.replace(budget, savings=savings, block=round(factor * budget.block))


def trial_structures(
    graph: ModelGraph, roles: Iterable[Role], align: int
) -> list[tuple[Role, float, dict[str, tuple[int, ...]]]]:
    """What is cut to measure the costs: (role, fraction of its units that is kept, kept units by group).

    Raises TargetError for a role that no group of the model has.
    """
    found = []
    for role in roles:
        groups = graph.of_role(role)
        if not groups:
            raise TargetError(f"no {role} groups can be pruned in this model", "Leave this role out of --roles")
        step = align if role.of_channels else 1
        sizes = {
            tuple(max(min(step, g.units), round(g.units * share / step) * step) for g in groups) for share in FRACTIONS
        }
        sizes.add(tuple(min(step, g.units) for g in groups))
        if max(group.units for group in groups) <= FEW_UNITS:
            sizes |= {tuple(min(size, g.units) for g in groups) for size in range(1, FEW_UNITS)}
        units = sum(group.units for group in groups)
        for kept in sorted(sizes, reverse=True):
            if sum(kept) < units:
                keep = {group.name: tuple(range(size)) for group, size in zip(groups, kept, strict=True)}
                found.append((role, sum(kept) / units, keep))
    return found
