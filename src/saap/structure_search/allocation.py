"""How the budget is shared among the decision variables: pure arithmetic of decrements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saap.core.records import FloatArray, IntArray, ModelGraph, Role, UnitScores
from saap.structure_search.decode_costs import TimeBudget
from saap.structure_search.objectives import Budget
from saap.structure_search.variables import DecisionVariable

AnyBudget = Budget | TimeBudget
Scores = Mapping[str, UnitScores]
Orders = Mapping[str, IntArray]
"""By group, its units from the first to be removed to the last."""


@dataclass(frozen=True, slots=True)
class Decrement:
    """One aligned step down of one variable: its size afterwards, and the cost that orders those of all variables."""

    cost: float
    variable: int
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A structure that a strategy proposes. sizes: kept units of each variable."""

    name: str
    sizes: tuple[int, ...]
    orders: Orders

    def keep(self, variables: Sequence[DecisionVariable]) -> dict[str, tuple[int, ...]]:
        """Kept unit indices of every group, ascending."""
        keep = {}
        for variable, size in zip(variables, self.sizes, strict=True):
            for group in variable.groups:
                keep[group.name] = tuple(np.sort(self.orders[group.name][variable.units - size :]).tolist())
        return keep


@dataclass(frozen=True, slots=True)
class SearchProblem:
    """Sizes of the variables are wanted that meet the budget, and an order of the units.

    dropped: blocks that are removed as a whole, whatever the sizes.
    """

    graph: ModelGraph
    variables: tuple[DecisionVariable, ...]
    scores: Scores
    budget: AnyBudget
    dropped: tuple[int, ...] = ()

    def propose(self, name: str, decrements: Sequence[Decrement], orders: Orders) -> Proposal:
        """The proposal that follows from these decrements. Raises TargetError."""
        return Proposal(name=name, sizes=self.sizes(decrements), orders=orders)

    def removed(self, sizes: Sequence[int]) -> int:
        """What counts for the budget and is removed at these sizes; exact where groups share tensors."""
        each = list(zip(self.variables, sizes, strict=True))
        shared = any(variable.role in (Role.HIDDEN, Role.EXPERT) for variable in self.variables)
        if shared or isinstance(self.budget, TimeBudget):
            counts = {group.name: size for variable, size in each for group in variable.groups}
            return self.budget.removed(self.graph, counts)
        return sum(variable.parameters_per_unit * (variable.units - size) for variable, size in each)

    def sizes(self, decrements: Sequence[Decrement]) -> tuple[int, ...]:
        """Sizes of the variables after the cheapest decrements until the budget is met.

        Those of one variable are taken in the order of its sizes whatever their costs. So at least what is requested is
        removed and at most one decrement more; those that turn out not to be needed are undone, the largest first.
        Raises TargetError, naming what can be reached, if all decrements together are not enough.
        """
        sizes, removed = [variable.units for variable in self.variables], 0
        for one in sorted(decrements, key=lambda one: (one.cost, one.variable, -one.kept)):
            if removed >= self.budget.removal:
                break
            if one.kept < sizes[one.variable]:
                sizes[one.variable] = one.kept
                removed = self.removed(sizes)
        if removed < self.budget.removal:
            raise self.budget.unreachable(self.graph, removed, "with these roles, skipped layers and alignment")
        return tuple(self._without_needless(sizes))

    def _without_needless(self, sizes: list[int]) -> list[int]:
        """Undo single decrements, the largest first, as long as enough stays removed."""
        while True:
            best: tuple[int, list[int]] | None = None
            removed = self.removed(sizes)
            for index, variable in enumerate(self.variables):
                position = variable.sizes.index(sizes[index])
                if position == 0:
                    continue
                trial = [*sizes[:index], variable.sizes[position - 1], *sizes[index + 1 :]]
                remaining = self.removed(trial)
                if remaining >= self.budget.removal and (best is None or removed - remaining > best[0]):
                    best = (removed - remaining, trial)
            if best is None:
                return sizes
            sizes = best[1]

    def by_share(self, shares: Sequence[float], *, round_down: bool = False) -> list[Decrement]:
        """Decrements by which each variable loses units in proportion to its share; with a share of 0 only at last.

        round_down: a variable takes a decrement once its share covers all of it, not already from half of it on. This
        matters where there are few units: a fifth of three KV groups is none of them, not one.
        """
        found = []
        for index, (variable, share) in enumerate(zip(self.variables, shares, strict=True)):
            for kept in variable.sizes[1:]:
                lost = (variable.units - kept - (0 if round_down else variable.step / 2)) / variable.units
                found.append(Decrement(lost / share if share > 0 else 1e6 + lost, index, kept))
        return found

    def by_score(self, sorted_scores: Callable[[str], FloatArray]) -> list[Decrement]:
        """Decrements by the score per parameter that is removed with them: a global ranking.

        sorted_scores: name of a group -> its units' scores in the order of removal.
        """
        found = []
        for index, variable in enumerate(self.variables):
            first, *others = (sorted_scores(group.name) for group in variable.groups)
            totals = sum(others, first)
            previous, highest = variable.units, -float("inf")
            for kept in variable.sizes[1:]:
                removed = totals[variable.units - previous : variable.units - kept]
                highest = max(highest, float(removed.mean()) / variable.parameters_per_unit)
                found.append(Decrement(highest, index, kept))
                previous = kept
        return found
