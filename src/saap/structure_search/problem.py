"""What a strategy solves: decision variables, each a number of units to keep, and a budget that they must meet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from saap.core.records import Candidate, CoupledGroup, FloatArray, IntArray, ModelGraph, Role, UnitScores
from saap.models.walk.backend import Progress, silent
from saap.structure_search.budget import AnyBudget, TimeBudget
from saap.structure_search.second_order import SecondOrder

Scores = Mapping[str, UnitScores]
Orders = Mapping[str, IntArray]
"""By group, its units from the first to be removed to the last."""
Evaluator = Callable[[Mapping[str, tuple[int, ...]], tuple[int, ...]], FloatArray]
"""Losses of a structure on the held-out samples, (samples,), given its kept units and dropped blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionVariable:
    """One size that the search sets for all `groups` together.

    units: of each group. sizes: the legal numbers of kept units, from all of them downwards; multiples of `step`
    after the first. parameters_per_unit: removed when every group loses one unit and nothing else is pruned.
    """

    role: Role
    groups: tuple[CoupledGroup, ...]
    units: int
    step: int
    sizes: tuple[int, ...]
    parameters_per_unit: int

    @property
    def of_heads(self) -> bool:
        """Whether it is attention, by whole KV groups or by query heads."""
        return self.role in (Role.ATTENTION, Role.QUERY)


@dataclass(frozen=True, slots=True)
class Decrement:
    """One aligned step down of one variable: its size afterwards, and the cost that orders those of all variables."""

    cost: float
    variable: int
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a strategy proposes. sizes: kept units of each variable. trail: what was measured, this one first."""

    name: str
    sizes: tuple[int, ...]
    orders: Orders
    trail: tuple[Candidate, ...] = ()

    def keep(self, variables: Sequence[DecisionVariable]) -> dict[str, tuple[int, ...]]:
        """Kept unit indices of every group, ascending."""
        return {
            group.name: tuple(np.sort(self.orders[group.name][variable.units - size :]).tolist())
            for variable, size in zip(variables, self.sizes, strict=True)
            for group in variable.groups
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchGuide:
    """What a strategy may go by, beyond the scores.

    costs: second-order costs, from which the best unmeasured proposal follows. evaluator: gives the losses of a
    structure, (samples,); None, or `evaluations` below 2, takes the first start unmeasured.
    """

    costs: SecondOrder | None = None
    evaluator: Evaluator | None = None
    evaluations: int = 0
    progress: Progress = silent


@dataclass(frozen=True, slots=True)
class SearchProblem:
    """Sizes of the variables are wanted that meet the budget, and an order of the units.

    dropped: blocks that are removed as a whole, whatever the sizes. protects_ends: whether the strategy is to protect
    the blocks at both ends; not where the request says which.
    """

    graph: ModelGraph
    variables: tuple[DecisionVariable, ...]
    scores: Scores
    budget: AnyBudget
    dropped: tuple[int, ...] = ()
    guide: SearchGuide = field(default_factory=SearchGuide)
    protects_ends: bool = True

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
            removed, undone = self.removed(sizes), list[tuple[int, list[int]]]()
            for index, variable in enumerate(self.variables):
                position = variable.sizes.index(sizes[index])
                if position > 0:
                    trial = [*sizes[:index], variable.sizes[position - 1], *sizes[index + 1 :]]
                    undone.append((removed - self.removed(trial), trial))
            spare = [one for one in undone if removed - one[0] >= self.budget.removal]
            if not spare:
                return sizes
            sizes = max(spare, key=lambda one: one[0])[1]

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


def importance_order(scores: Scores) -> dict[str, IntArray]:
    """Units of each group from the least to the most important."""
    return {name: np.argsort(score.mean, kind="stable") for name, score in scores.items()}
