"""Literal strategies and single importances on the real model, with and without reconstruction (effort `fast`)."""

import copy

from harness.experiment import Cells, Measured, Names, Request, Scaled, Values
from lab.commands import VALIDATION
from lab.dense import opened, wikitext2

from saap.core.records import ImportanceScores, Role
from saap.estimation.estimate import estimate, unit_scores
from saap.models.walk.backend import Backend
from saap.settings.prune import ElementOrder, FusionScope
from saap.settings.registry import Importance, Strategy
from saap.surgery.cut import cut
from saap.surgery.reconstruct import ReconstructionSettings, reconstruct

EQUAL_SHARES = (Importance.VECTOR, Importance.ELEMENT1, Importance.ELEMENT2, Importance.MIXED, Importance.FUSED)
FUSED = (Strategy.IMPORTANCE, Strategy.VOLATILITY_Z, Strategy.VOLATILITY_CV)
CHOICES = {
    f"{strategy}-{importance}": (strategy, importance)
    for strategy, importance in (
        *((Strategy.UNIFORM, importance) for importance in EQUAL_SHARES),
        *((strategy, Importance.FUSED) for strategy in FUSED),
    )
}
ORDERS = {Importance.ELEMENT1: ElementOrder.FIRST, Importance.MIXED: ElementOrder.MIXED}
RATIO = 0.2
CELLS = list(CHOICES)
SETTINGS = {
    "model": "{model}", "calibration": VALIDATION, "seed": 0, "pruning ratio": RATIO,
    "samples": Scaled(4, 50), "sample length": Scaled(32, 128),
    "refit sequences": Scaled(2, 16), "refit length": Scaled(64, 512),
    "measured tokens": Scaled(512, 8192),
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
            model = copy.deepcopy(dense.model)
            how = ReconstructionSettings(second_order=False)
            reconstruct(Backend(model, dense.graph), plan, dense.ids(tokens["refit"]), how)
            cut(model, dense.graph, plan)
            yield cell, {"ratio_without_restoration": without, "ratio_with_restoration": ratios.of(model)["wikitext2"]}


def summarise(cells: Cells) -> Values:
    rows = [
        {"strategy": str(strategy), "importance": str(importance), **cells[name]}
        for name, (strategy, importance) in CHOICES.items()
    ]
    by_kind: dict[bool, list[float]] = {False: [], True: []}
    for row in rows:
        by_kind[row["strategy"].startswith("volatility")].append(row["ratio_with_restoration"])
    return {
        "rows": rows,
        "usual": [min(by_kind[False]), max(by_kind[False])],
        "literal": [min(by_kind[True]), max(by_kind[True])],
    }
