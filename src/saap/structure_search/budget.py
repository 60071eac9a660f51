"""What "enough" means: every target becomes parameters, or shares of the decoding time, that must be removed."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from saap.core.errors import TargetError
from saap.core.records import ModelGraph, Role, StructurePlan, count_parameters
from saap.models.structure.keep_index import KeepIndex, Kept

Point = tuple[float, float]
WHOLE = 10**9
"""Time of one decoding step of the dense model; whole numbers, so that sums do not depend on their order."""

LARGEST_CORRECTION = 0.15
FRACTIONS = (0.7, 0.4)
"""Of its units that every group of a role keeps in the trials, in addition to the least possible."""
FEW_UNITS = 4
"""Groups of so many units or fewer are tried at every number of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """At least `removal` parameters must be removed: of the decoder blocks, or (`whole_model`) of the whole model."""

    removal: int
    whole_model: bool = False

    def removed(self, graph: ModelGraph, keep: Mapping[str, Kept], dropped_blocks: Iterable[int] = ()) -> int:
        """Parameters that count and are removed by this structure."""
        shapes = KeepIndex.of(graph, keep, dropped_blocks).shapes
        if self.whole_model:
            return graph.parameters - count_parameters(shapes)
        return graph.block_parameters - count_parameters(graph.in_blocks(shapes))

    def unreachable(
        self, graph: ModelGraph, removed: int, how: str, allow: str = "more roles or layers"
    ) -> TargetError:
        """The refusal of a budget of which at most `removed` can be reached. allow: what would remove more."""
        base = graph.parameters if self.whole_model else graph.block_parameters
        return TargetError(
            f"{self.removal:,} parameters cannot be removed {how}, at most {removed:,} can",
            f"Ask for a reduction of at most {int(removed / base * 1000) / 1000:g}, or allow {allow}",
        )


def budget_for_ratio(graph: ModelGraph, ratio: float) -> Budget:
    """Budget of a fraction `ratio` of the decoder blocks' parameters. Raises TargetError."""
    if not 0 <= ratio < 1:
        raise TargetError(
            f"pruning ratio {ratio:g} is out of range", "Give a fraction of at least 0 and below 1, e.g. 0.2"
        )
    return Budget(removal=math.ceil(ratio * graph.block_parameters - 1e-6))


def budget_for_parameters(graph: ModelGraph, target: int) -> Budget:
    """Budget so that at most `target` remain in the whole model. Raises TargetError."""
    if target > graph.parameters or target < 1:
        raise TargetError(
            f"target of {target:,} parameters is out of range for a model of {graph.parameters:,}",
            f"Give a number from 1 to {graph.parameters:,}",
        )
    return Budget(removal=graph.parameters - target, whole_model=True)


def header_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes that a safetensors file takes besides its tensors: an upper bound from the names and shapes."""
    placed = {"dtype": "BF16", "data_offsets": [2**40, 2**40]}
    return 72 + len(json.dumps({name: {**placed, "shape": list(shape)} for name, shape in shapes.items()}))


def budget_for_bytes(graph: ModelGraph, target: int, bytes_per_parameter: int) -> Budget:
    """Budget so that the weights as written take at most `target` bytes. Raises TargetError."""
    header = header_bytes(graph.shapes)
    full, allowed = graph.parameters * bytes_per_parameter + header, (target - header) // bytes_per_parameter
    if allowed < 1 or target > full:
        raise TargetError(
            f"target of {target:,} bytes is out of range for weights of {full:,} bytes",
            f"Give a size from {header + bytes_per_parameter:,} to {full:,} bytes",
        )
    return Budget(removal=max(0, graph.parameters - allowed), whole_model=True)


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
    curve = [(1.0, 0.0)]
    for fraction, share in sorted(points, reverse=True):
        curve.append((fraction, max(curve[-1][1], share)))
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

    def removed(self, graph: ModelGraph, keep: Mapping[str, Kept], dropped_blocks: Iterable[int] = ()) -> int:
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

    def unreachable(
        self, graph: ModelGraph, removed: int, how: str, allow: str = "more roles or layers"
    ) -> TargetError:
        """The refusal of a budget of which at most `removed` can be reached. allow: what would remove more."""
        requested, largest = WHOLE / (WHOLE - self.removal), WHOLE / (WHOLE - removed)
        return TargetError(
            f"a speed-up of {requested:.2f} cannot be reached {how}; the largest is {int(largest * 100) / 100:g}",
            f"Ask for less, or allow {allow}",
        )

    def corrected(self, *, predicted: float, measured: float) -> Self:
        """With all savings scaled so that a plan whose speed-up was `predicted` gets the `measured` one.

        A measurement that is far off says more about other work on the machine than about the model, so the factor
        stays within LARGEST_CORRECTION of 1.
        """
        factor = (1 - 1 / measured) / (1 - 1 / predicted)
        factor = min(1 + LARGEST_CORRECTION, max(1 - LARGEST_CORRECTION, factor))
        savings = {name: tuple(round(factor * saved) for saved in found) for name, found in self.savings.items()}
        return dataclasses.replace(self, savings=savings, block=round(factor * self.block))


AnyBudget = Budget | TimeBudget


def budget_for_speedup(graph: ModelGraph, costs: DecodeCosts, speedup: float) -> TimeBudget:
    """Budget so that decoding is `speedup` times as fast as in the dense model, by the measured costs.

    What all groups of a role save together is divided among them by their units.
    """
    savings: dict[str, tuple[int, ...]] = {}
    for role in costs.curves:
        units = sum(group.units for group in graph.of_role(role))
        for group in graph.of_role(role):
            fractions = (kept / group.units for kept in range(group.units + 1))
            share = group.units / units
            savings[group.name] = tuple(round(WHOLE * share * costs.saved(role, fraction)) for fraction in fractions)
    layers = {group.name: group.layer for group in graph.groups}
    block = round(WHOLE * (costs.block or 0.0))
    return TimeBudget(removal=math.ceil(WHOLE * (1 - 1 / speedup)), savings=savings, layers=layers, block=block)


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
            tuple(min(g.units, max(step, round(g.units * share / step) * step)) for g in groups) for share in FRACTIONS
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
