"""How much each slot gives: pure arithmetic of steps and budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from saap.core.records import FloatArray, ModelGraph, Role
from saap.structure_search.decode_costs import TimeBudget
from saap.structure_search.objectives import Budget
from saap.structure_search.slots import Slot

Counts = dict[str, int]
AnyBudget = Budget | TimeBudget


@dataclass(frozen=True, slots=True)
class Step:
    """One aligned step of one slot: its size after the step, and the price that orders steps of all slots."""

    price: float
    slot: int
    kept: int


def removed_by(graph: ModelGraph, slots: Sequence[Slot], sizes: Sequence[int], budget: AnyBudget) -> int:
    """What counts and leaves when slot i keeps `sizes[i]` units; exact where groups share tensors."""
    if isinstance(budget, TimeBudget) or any(slot.role in (Role.HIDDEN, Role.EXPERT) for slot in slots):
        return budget.removed(graph, counts_of(slots, sizes))
    return sum(slot.parameters_per_unit * (slot.units - size) for slot, size in zip(slots, sizes, strict=True))


def take_steps(graph: ModelGraph, slots: Sequence[Slot], steps: Sequence[Step], budget: AnyBudget) -> tuple[int, ...]:
    """Sizes of the slots after taking the cheapest steps until the budget is met.

    The steps of one slot are taken in the order of their sizes whatever their prices. So at least what is asked
    leaves and at most one step more; steps that turn out not to be needed are given back, the largest first.
    Raises TargetError, naming what can be reached, if all steps together are not enough.
    """
    sizes = [slot.units for slot in slots]
    removed = 0
    for step in sorted(steps, key=lambda step: (step.price, step.slot, -step.kept)):
        if removed >= budget.removal:
            break
        if step.kept < sizes[step.slot]:
            sizes[step.slot] = step.kept
            removed = removed_by(graph, slots, sizes, budget)
    if removed < budget.removal:
        raise budget.unreachable(graph, removed, "with these roles, skipped layers and alignment")
    return tuple(_give_back(graph, slots, sizes, budget))


def _give_back(graph: ModelGraph, slots: Sequence[Slot], sizes: list[int], budget: AnyBudget) -> list[int]:
    """Undo single steps, the largest first, as long as enough stays removed."""
    while True:
        best: tuple[int, int, int] | None = None
        removed = removed_by(graph, slots, sizes, budget)
        for index, slot in enumerate(slots):
            position = slot.sizes.index(sizes[index])
            if position == 0:
                continue
            trial = [*sizes]
            trial[index] = slot.sizes[position - 1]
            remaining = removed_by(graph, slots, trial, budget)
            if remaining >= budget.removal and (best is None or removed - remaining > best[0]):
                best = (removed - remaining, index, trial[index])
        if best is None:
            return sizes
        sizes[best[1]] = best[2]


def steps_by_share(slots: Sequence[Slot], shares: Sequence[float], *, round_down: bool = False) -> list[Step]:
    """Steps priced so that each slot gives units in proportion to its share; a share of 0 gives only at last.

    round_down: a slot gives a step once its share covers all of it, not already from half of it on. This matters where
    a slot has few units: a fifth of three KV groups is none of them, not one.
    """
    steps = []
    for index, (slot, share) in enumerate(zip(slots, shares, strict=True)):
        for kept in slot.sizes[1:]:
            given = (slot.units - kept - (0 if round_down else slot.step / 2)) / slot.units
            steps.append(Step(given / share if share > 0 else 1e6 + given, index, kept))
    return steps


def steps_by_score(slots: Sequence[Slot], sorted_scores: Callable[[str], FloatArray]) -> list[Step]:
    """Steps priced by the score per parameter that leaves with them: a global ranking.

    sorted_scores: name of a group -> its units' scores in the order of removal.
    """
    steps = []
    for index, slot in enumerate(slots):
        totals = sum((sorted_scores(group.name) for group in slot.groups[1:]), sorted_scores(slot.groups[0].name))
        previous, highest = slot.units, -float("inf")
        for kept in slot.sizes[1:]:
            gone = totals[slot.units - previous : slot.units - kept]
            highest = max(highest, float(gone.mean()) / slot.parameters_per_unit)
            steps.append(Step(highest, index, kept))
            previous = kept
    return steps


def counts_of(slots: Sequence[Slot], sizes: Sequence[int]) -> Counts:
    """Kept units by name of group."""
    return {group.name: size for slot, size in zip(slots, sizes, strict=True) for group in slot.groups}


def keep_of(counts: Mapping[str, int], orders: Callable[[str], Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Kept unit indices, ascending. orders: name of a group -> its units from the first to leave to the last."""
    keep = {}
    for name, kept in counts.items():
        order = [int(unit) for unit in orders(name)]
        keep[name] = tuple(sorted(order[len(order) - kept :]))
    return keep
