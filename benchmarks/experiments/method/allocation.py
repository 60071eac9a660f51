"""How much each module gives: ways to divide a budget over the modules, at the same restoration."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from harness.experiment import Cells, Measured, Names, Request, Scaled, Values
from lab.dense import Dense, Ratios, opened, source_of
from lab.measures import geometric_mean
from lab.texts import TEXTS
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from experiments.quality.models import GEMMA, QWEN, SMOLLM2
from saap.core.records import FloatArray, Layout, StructurePlan
from saap.data.texts import MIXED
from saap.settings.presets import PRESETS, Preset
from saap.settings.prune import PrunableRole
from saap.settings.registry import Strategy
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.evaluator import StructureEvaluator
from saap.structure_search.plan import SearchSpace, build_variables, make_plan, search
from saap.structure_search.problem import DecisionVariable, Proposal, SearchGuide, SearchProblem, importance_order
from saap.structure_search.second_order import SecondOrder
from saap.structure_search.strategies import (
    FIRST_SHARE,
    LAST_SHARE,
    adaptive,
    importance,
    module_shares,
)
from saap.surgery.reconstruct import ReconstructionSettings

Result = TypeVar("Result")
RATIOS = ("0.2", "0.5", "0.1", "0.3")
MODELS = {SMOLLM2: RATIOS, GEMMA: RATIOS[:2], QWEN: RATIOS[:1]}
"""Pruning ratios of each model."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Equal shares of the FFNs, but at both ends. first, last: shares of the blocks that lose nothing."""

    meaning: str
    first: float = FIRST_SHARE
    last: float = LAST_SHARE

    def share(self, variable: DecisionVariable, blocks: int) -> float:
        """The share that a module loses, relative to the others."""
        inside = round(self.first * blocks) <= variable.groups[0].layer < blocks - round(self.last * blocks)
        return float(inside and not variable.of_heads)


DEFAULT, KNAPSACK = "default search", "knapsack"
PROFILES = {
    "uniform": Profile(meaning="the same share of every FFN, the first 4 and last 2 of 30 blocks protected"),
    "first 6": Profile(meaning="as uniform, with the first 6 protected", first=6 / 30),
    "last 4": Profile(meaning="as uniform, with the last 4 protected", last=4 / 30),
    "last 8": Profile(meaning="as uniform, with the last 8 protected", last=8 / 30),
}
LEVEL = 0.02
"""Differences of the mean below it count as none: one seed, and few tokens."""
ALLOCATIONS = {
    **{name: profile.meaning for name, profile in PROFILES.items()},
    "module importance": "shares by the importance of modules, attention at 0.3 of an FFN",
    "importance": "all units ranked by token-level Fisher score per parameter",
    "second-order": "all units ranked by second-order cost per parameter, after compensation",
    DEFAULT: "what the default search chooses by the masked loss of whole plans, on the held-out samples of this table",
    KNAPSACK: "a loss curve of each module alone, after compensation; a knapsack over all of them",
}
LEVELS = (0.2, 0.5, 1.0)
"""Shares of a module's units at which its loss curve is measured; linear in between."""
MEASURED = ("wikitext2", "novel")
SETTINGS = {
    "model": "{model}", "calibration": MIXED, "samples": Scaled(4, 50), "sample length": Scaled(32, 128),
    "held-out samples": Scaled(2, 8), "refit sequences": Scaled(4, 16), "refit length": Scaled(64, 512),
    "candidates": Scaled(3, PRESETS[Preset.DEFAULT].search_evaluations), "measured tokens": Scaled(512, 4096),
}  # fmt: skip
PARTIAL = True


def cells(request: Request) -> Names:
    models = {SMOLLM2: RATIOS[:1]} if request.quick else MODELS
    return [f"{model}/{ratio}/{name}" for model, ratios in models.items() for ratio in ratios for name in ALLOCATIONS]


def measure(request: Request, wanted: Names) -> Measured:
    chosen = request.settings
    for model in dict.fromkeys(cell.split("/")[0] for cell in wanted):
        with opened(source_of(request, model)) as dense:
            ratios = Ratios(dense, chosen["measured tokens"], {name: TEXTS[name] for name in MEASURED})
            prepared = Prepared(dense, chosen)
            for cell in (one for one in wanted if one.startswith(f"{model}/")):
                _, ratio, name = cell.split("/")
                shared, begun = prepared.shared_seconds(name), time.process_time()
                plan = prepared.plan(name, float(ratio))
                seconds = shared + time.process_time() - begun
                masked, restored = ratios.masked(plan), ratios.of(prepared.restored(plan))
                loss = prepared.loss(plan)
                yield cell, {"loss": loss, "masked": masked, "restored": restored, "seconds": round(seconds, 1)}


@dataclass(frozen=True)
class Timed(Generic[Result]):
    """A result and the processor time that it took."""

    found: Result
    seconds: float

    @classmethod
    def of(cls, make: Callable[[], Result]) -> "Timed[Result]":
        begun = time.process_time()
        found = make()
        return cls(found, time.process_time() - begun)


class Prepared:
    """Scores, second-order costs, evaluators and loss curves of one model; all budgets share them."""

    def __init__(self, dense: Dense, chosen: Values) -> None:
        self._dense, self._candidates = dense, chosen["candidates"]
        length = chosen["sample length"]
        samples = dense.samples(
            chosen["calibration"], scored=(chosen["samples"], length), held=(chosen["held-out samples"], length),
            refit=(chosen["refit sequences"], chosen["refit length"]),
        )  # fmt: skip
        self._space = SearchSpace(
            roles=(PrunableRole.FFN, PrunableRole.ATTENTION), layout=Layout.ADAPTIVE, align=dense.align
        )
        self._scores = dense.token_fisher(samples["scored"])
        self._text, held = dense.ids(samples["refit"]), dense.ids(samples["held"])
        self._scored, self._held = dense.ids(samples["scored"]), held
        self._masking = StructureEvaluator(dense.backend, held)

    def shared_seconds(self, name: str) -> float:
        """Processor time of what the plans of all budgets share, which is measured at its first use."""
        costs = self._costs.seconds if name in ("second-order", KNAPSACK) else 0.0
        return costs + (self._curves.seconds if name == KNAPSACK else 0.0)

    @cached_property
    def _costs(self) -> Timed[SecondOrder]:
        return Timed.of(lambda: self._dense.second_order_costs(self._scored))

    @cached_property
    def _curves(self) -> Timed[tuple[FloatArray, ...]]:
        costs, variables = self._costs.found, build_variables(self._dense.graph, self._space)
        evaluator = StructureEvaluator(self._dense.backend, self._held, costs.grams)
        return Timed.of(lambda: tuple(loss_curve(one, {**costs.orders}, evaluator) for one in variables))

    def plan(self, name: str, ratio: float) -> StructurePlan:
        """The plan of one allocation for one budget."""
        graph, budget = self._dense.graph, budget_for_ratio(self._dense.graph, ratio)
        if name == DEFAULT:
            guide = SearchGuide(evaluator=self._masking, evaluations=self._candidates)
            return search(graph, self._scores, budget, self._space, Strategy.ADAPTIVE, guide)
        problem = SearchProblem(graph, build_variables(graph, self._space), self._scores, budget)
        proposals: dict[str, Callable[[], Proposal]] = {
            "module importance": lambda: self._by_shares(
                problem, module_shares(problem.variables, self._scores, attention=0.3)
            ),
            "importance": lambda: importance(problem),
            "second-order": lambda: adaptive(dataclasses.replace(problem, guide=SearchGuide(costs=self._costs.found))),
            KNAPSACK: lambda: self._knapsack(problem),
        }
        if name in PROFILES:
            shares = [PROFILES[name].share(one, len(graph.blocks)) for one in problem.variables]
            proposal = self._by_shares(problem, shares)
        else:
            proposal = proposals[name]()
        keep = proposal.keep(problem.variables)
        return make_plan(graph, keep, (), layout=Layout.ADAPTIVE, strategy=name, align=self._space.align)

    def _by_shares(self, problem: SearchProblem, shares: Sequence[float]) -> Proposal:
        return problem.propose("shares", problem.by_share(shares), importance_order(self._scores))

    def _knapsack(self, problem: SearchProblem) -> Proposal:
        sizes = knapsack(problem.variables, self._curves.found, problem.budget.removal)
        return Proposal(name=KNAPSACK, sizes=sizes, orders={**self._costs.found.orders})

    def loss(self, plan: StructurePlan) -> float:
        """What the search goes by: the loss of the masked model on held-out samples, in nats per token."""
        return float(self._masking(plan.keep).mean())

    def restored(self, plan: StructurePlan) -> nn.Module:
        """The pruned model after the reconstruction, which chooses the units at the plan's counts."""
        how = ReconstructionSettings(scores={name: score.mean for name, score in self._scores.items()})
        return self._dense.pruned(plan, self._text, how)


def loss_curve(variable: DecisionVariable, orders: dict[str, np.ndarray], evaluator: StructureEvaluator) -> FloatArray:
    """Loss of the model with this variable alone at each of its sizes, (sizes,) in nats per token, never decreasing."""
    wanted = {min(variable.sizes, key=lambda size: abs(variable.units * (1 - level) - size)) for level in LEVELS}
    points, losses = [0.0], [0.0]
    for size in sorted(wanted - {variable.units}, reverse=True):
        removed = variable.units - size
        keep = {one.name: tuple(np.sort(orders[one.name][removed:]).tolist()) for one in variable.groups}
        points.append(float(removed))
        losses.append(max(losses[-1], float(evaluator(keep).mean())))
    return np.interp([variable.units - size for size in variable.sizes], points, losses)


def knapsack(variables: tuple[DecisionVariable, ...], losses: tuple[FloatArray, ...], removal: int) -> tuple[int, ...]:
    """The sizes of least summed loss that remove enough: a multiple-choice knapsack, solved as an integer program."""
    cost = np.concatenate(losses)
    weight = np.concatenate(
        [[one.parameters_per_unit * (one.units - size) for size in one.sizes] for one in variables]
    ).astype(float)
    ends = np.cumsum([len(one.sizes) for one in variables])
    choice = np.zeros((len(variables), len(cost)))
    for row, (one, end) in enumerate(zip(variables, ends, strict=True)):
        choice[row, end - len(one.sizes) : end] = 1
    solved = milp(
        cost, integrality=np.ones(len(cost)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(choice, 1, 1), LinearConstraint(weight[None] / removal, 1, np.inf)],
        options={"mip_rel_gap": 1e-4, "time_limit": 60},
    )  # fmt: skip
    if solved.x is None:
        raise SystemExit(f"The knapsack was not solved: {solved.message}")
    chosen = [int(part.argmax()) for part in np.split(solved.x, ends[:-1])]
    return tuple(one.sizes[index] for one, index in zip(variables, chosen, strict=True))


def summarise(cells: Cells) -> Values:
    tables: dict[str, dict[str, Values]] = {}
    for cell, values in cells.items():
        model, ratio, name = cell.split("/")
        mean = geometric_mean([*values["restored"].values()])
        tables.setdefault(f"{model}, {float(ratio):.0%}", {})[name] = {**values, "mean": mean}
    behind = {
        where: rows[DEFAULT]["mean"] / min(row["mean"] for row in rows.values()) - 1
        for where, rows in tables.items()
        if DEFAULT in rows
    }
    near = sum(share <= LEVEL for share in behind.values())
    return {
        "tables": tables, "meaning": ALLOCATIONS, "behind": behind, "near": near, "level": LEVEL,
        "most": max(behind.values(), default=0.0),
    }  # fmt: skip
