"""How much each module gives: ways to divide a budget over the modules, at the same restoration."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from harness.experiment import Cells, Measured, Names, Request, Scaled, Values
from lab.dense import Dense, Ratios, opened, source_of
from lab.texts import TEXTS
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from saap.core.records import FloatArray, Layout, StructurePlan
from saap.data.texts import MIXED
from saap.settings.presets import PRESETS, Preset
from saap.settings.prune import PrunableRole
from saap.settings.registry import Strategy
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.evaluator import StructureEvaluator
from saap.structure_search.plan import SearchSpace, build_variables, make_plan, search
from saap.structure_search.problem import DecisionVariable, Proposal, SearchGuide, SearchProblem, importance_order
from saap.structure_search.strategies import adaptive, importance, module_shares
from saap.surgery.reconstruct import ReconstructionSettings

MODELS = ("smollm2", "gemma-3-270m", "qwen2.5-coder-0.5b")
ALLOCATIONS = {
    "uniform": "the same share of every FFN, both ends protected; nothing is measured",
    "module importance": "shares by the importance of modules, attention at 0.3 of an FFN; nothing is measured",
    "importance": "all units ranked by token-level Fisher score per parameter; nothing is measured",
    "second-order": "all units ranked by second-order cost per parameter, after compensation; nothing is measured",
    "evolution": "the best of the candidates of the default search, each measured as a whole, masked",
    "knapsack, masked": "a loss curve of each module alone, masked; a knapsack over all of them",
    "knapsack, compensated": "a loss curve of each module alone, after compensation; a knapsack over all of them",
}
LEVELS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Shares of a module's units at which its loss curve is measured; linear in between."""
MEASURED = ("wikitext2", "novel")
SETTINGS = {
    "model": "{model}", "calibration": MIXED, "models": Scaled(["smollm2"], list(MODELS)),
    "pruning ratios": Scaled([0.2], [0.1, 0.2, 0.3, 0.5]), "samples": Scaled(4, 50), "sample length": Scaled(32, 128),
    "held-out samples": Scaled(2, 8), "refit sequences": Scaled(4, 24), "refit length": Scaled(64, 512),
    "candidates": Scaled(3, PRESETS[Preset.DEFAULT].search_evaluations), "measured tokens": Scaled(512, 8192),
}  # fmt: skip
PARTIAL = True


def cells(request: Request) -> Names:
    chosen = request.settings
    return [
        f"{model}/{ratio:g}/{name}"
        for model in chosen["models"]
        for ratio in chosen["pruning ratios"]
        for name in ALLOCATIONS
    ]


def measure(request: Request, wanted: Names) -> Measured:
    chosen = request.settings
    for model in chosen["models"]:
        if not any(cell.startswith(f"{model}/") for cell in wanted):
            continue
        with opened(source_of(request, model)) as dense:
            ratios = Ratios(dense, chosen["measured tokens"], {name: TEXTS[name] for name in MEASURED})
            prepared = Prepared(dense, chosen)
            for ratio in chosen["pruning ratios"]:
                for name in ALLOCATIONS:
                    cell = f"{model}/{ratio:g}/{name}"
                    if cell in wanted:
                        begun = time.process_time()
                        plan = prepared.plan(name, ratio)
                        seconds = time.process_time() - begun + prepared.shared_seconds(name)
                        masked, restored = ratios.masked(plan), ratios.of(prepared.restored(plan))
                        yield cell, {"masked": masked, "restored": restored, "seconds": round(seconds, 1)}


@dataclass(frozen=True)
class Curves:
    """Measured loss of each variable alone at each of its sizes, and the processor time of the measurement."""

    losses: tuple[FloatArray, ...]
    seconds: float


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
        begun = time.process_time()
        self._costs = dense.second_order_costs(dense.ids(samples["scored"]))
        self._cost_seconds = time.process_time() - begun
        self._masking = StructureEvaluator(dense.backend, held)
        self._compensating = StructureEvaluator(dense.backend, held, self._costs.grams)
        self._curves: dict[str, Curves] = {}

    def shared_seconds(self, name: str) -> float:
        """Processor time of what the plans of all budgets share."""
        compensated = name in ("second-order", "knapsack, compensated")
        curves = self._curves[name].seconds if name in self._curves else 0.0
        return curves + (self._cost_seconds if compensated else 0.0)

    def plan(self, name: str, ratio: float) -> StructurePlan:
        """The plan of one allocation for one budget."""
        graph, budget = self._dense.graph, budget_for_ratio(self._dense.graph, ratio)
        if name == "evolution":
            guide = SearchGuide(evaluator=self._masking, evaluations=self._candidates)
            return search(graph, self._scores, budget, self._space, Strategy.ADAPTIVE, guide)
        problem = SearchProblem(graph, build_variables(graph, self._space), self._scores, budget)
        proposals: dict[str, Callable[[], Proposal]] = {
            "uniform": lambda: adaptive(problem),
            "module importance": lambda: self._by_modules(problem),
            "importance": lambda: importance(problem),
            "second-order": lambda: adaptive(dataclasses.replace(problem, guide=SearchGuide(costs=self._costs))),
        }
        proposal = proposals.get(name, lambda: self._knapsack(problem, name))()
        keep = proposal.keep(problem.variables)
        return make_plan(graph, keep, (), layout=Layout.ADAPTIVE, strategy=name, align=self._space.align)

    def _means(self) -> dict[str, FloatArray]:
        return {name: score.mean for name, score in self._scores.items()}

    def _by_modules(self, problem: SearchProblem) -> Proposal:
        decrements = problem.by_share(module_shares(problem.variables, self._scores, attention=0.3))
        return problem.propose("module importance", decrements, importance_order(self._scores))

    def _knapsack(self, problem: SearchProblem, name: str) -> Proposal:
        orders = {**self._costs.orders} if name.endswith("compensated") else importance_order(self._scores)
        evaluator = self._compensating if name.endswith("compensated") else self._masking
        if name not in self._curves:
            begun = time.process_time()
            losses = tuple(loss_curve(one, orders, evaluator) for one in problem.variables)
            self._curves[name] = Curves(losses, time.process_time() - begun)
        sizes = knapsack(problem.variables, self._curves[name].losses, problem.budget.removal)
        return Proposal(name=name, sizes=sizes, orders=orders)

    def restored(self, plan: StructurePlan) -> nn.Module:
        """The pruned model after the reconstruction, which chooses the units at the plan's counts."""
        how = ReconstructionSettings(scores=self._means())
        return self._dense.pruned(plan, self._text, how)


def loss_curve(variable: DecisionVariable, orders: dict[str, np.ndarray], evaluator: StructureEvaluator) -> FloatArray:
    """Loss of the model with this variable alone at each of its sizes, (sizes,) in nats per token, never decreasing."""
    wanted = {min(variable.sizes, key=lambda size: abs(variable.units * (1 - level) - size)) for level in LEVELS}
    points, losses = [0.0], [0.0]
    for size in sorted(wanted - {variable.units}, reverse=True):
        removed = variable.units - size
        keep = {one.name: tuple(np.sort(orders[one.name][removed:]).tolist()) for one in variable.groups}
        points.append(float(removed))
        losses.append(max(losses[-1], evaluator(keep)))
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
    found: dict[str, dict[str, Values]] = {}
    for cell, values in cells.items():
        model, ratio, name = cell.split("/")
        found.setdefault(f"{model}, {float(ratio):.0%}", {})[name] = values
    best = {where: min(rows, key=lambda name: sum(rows[name]["restored"].values())) for where, rows in found.items()}
    wins = {name: sum(one == name for one in best.values()) for name in ALLOCATIONS}
    return {
        "tables": found,
        "best": best,
        "wins": wins,
        "meaning": ALLOCATIONS,
        "most": max(wins, key=wins.__getitem__),
    }
