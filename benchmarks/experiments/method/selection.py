"""Literal strategies and single importances on the real model, with and without reconstruction (effort `fast`)."""

from itertools import product

from harness.experiment import Cells, Measured, Names, Request, Scaled, Values
from lab.commands import VALIDATION
from lab.dense import opened, wikitext2

from saap.core.records import ImportanceScores, Role
from saap.estimation.estimate import estimate, unit_scores
from saap.settings.prune import ElementOrder, FusionScope
from saap.settings.registry import Importance, Strategy
from saap.surgery.reconstruct import ReconstructionSettings

EQUAL_SHARES = (Importance.VECTOR, Importance.ELEMENT1, Importance.ELEMENT2, Importance.MIXED, Importance.FUSED)
FUSED = (Strategy.IMPORTANCE, Strategy.VOLATILITY_Z, Strategy.VOLATILITY_CV)
PAIRS = [*product([Strategy.UNIFORM], EQUAL_SHARES), *product(FUSED, [Importance.FUSED])]
CHOICES = {f"{strategy}-{importance}": (strategy, importance) for strategy, importance in PAIRS}
ORDERS = {Importance.ELEMENT1: ElementOrder.FIRST, Importance.MIXED: ElementOrder.MIXED}
RATIO = 0.2
CELLS = list(CHOICES)
SETTINGS = {
    "model": "{model}", "calibration": VALIDATION, "seed": 0, "pruning ratio": RATIO,
    "samples": Scaled(4, 50), "sample length": Scaled(32, 128),
    "refit sequences": Scaled(2, 16), "refit length": Scaled(64, 512), "measured tokens": Scaled(512, 8192),
}  # fmt: skip


def measure(request: Request, wanted: Names) -> Measured:
    chosen = request.settings
    estimates: dict[ElementOrder, ImportanceScores] = {}
    with opened(request.model) as dense:
        tokens = dense.samples(
            VALIDATION, scored=(chosen["samples"], chosen["sample length"]),
            refit=(chosen["refit sequences"], chosen["refit length"]),
        )  # fmt: skip
        ratios = wikitext2(dense, chosen["measured tokens"])
        for cell in wanted:
            strategy, importance = CHOICES[cell]
            order = ORDERS.get(importance, ElementOrder.SECOND)
            if order not in estimates:
                estimates[order] = estimate(dense.backend, tokens["scored"], roles=[Role.FFN], element_order=order)
            units = unit_scores(estimates[order], dense.graph, importance, FusionScope.LAYER_ROLE)
            plan = dense.plan(units, RATIO, strategy)
            without = ratios.masked(plan)["wikitext2"]
            model = dense.pruned(plan, dense.ids(tokens["refit"]), ReconstructionSettings(second_order=False))
            yield cell, {"ratio_without_restoration": without, "ratio_with_restoration": ratios.of(model)["wikitext2"]}


def summarise(cells: Cells) -> Values:
    rows = []
    ratios: dict[str, list[float]] = {"usual": [], "literal": []}
    for name, (strategy, importance) in CHOICES.items():
        rows.append({"strategy": str(strategy), "importance": str(importance), **cells[name]})
        kind = "literal" if strategy.startswith("volatility") else "usual"
        ratios[kind].append(cells[name]["ratio_with_restoration"])
    return {"rows": rows, **{kind: [min(values), max(values)] for kind, values in ratios.items()}}
