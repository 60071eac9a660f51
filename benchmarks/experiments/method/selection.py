"""Literal strategies and single importances on the real model, with and without reconstruction (effort `fast`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import VALIDATION
from lab.dense import draw, masked_perplexity, measured_text, on_device, open_dense, plan_for

from saap.core.records import Role
from saap.data.placement import SampleRequest
from saap.estimation.estimate import estimate, unit_scores
from saap.models.loading.devices import quick_float32_products
from saap.models.walk.backend import Backend
from saap.settings.prune import ElementOrder, FusionScope
from saap.settings.registry import Importance, Strategy
from saap.surgery.cut import cut
from saap.surgery.reconstruct import ReconstructionSettings, reconstruct

CHOICES = {
    f"{strategy}-{importance}": (strategy, importance)
    for strategy, importance in (
        (Strategy.UNIFORM, Importance.VECTOR),
        (Strategy.UNIFORM, Importance.ELEMENT1),
        (Strategy.UNIFORM, Importance.ELEMENT2),
        (Strategy.UNIFORM, Importance.MIXED),
        (Strategy.UNIFORM, Importance.FUSED),
        (Strategy.IMPORTANCE, Importance.FUSED),
        (Strategy.VOLATILITY_Z, Importance.FUSED),
        (Strategy.VOLATILITY_CV, Importance.FUSED),
    )
}
ORDERS = {Importance.ELEMENT1: ElementOrder.FIRST, Importance.MIXED: ElementOrder.MIXED}
RATIO = 0.2


def settings(request: Request) -> Values:
    quick = request.quick
    return {
        "model": request.model, "calibration": VALIDATION, "seed": 0, "pruning ratio": RATIO,
        "samples": 4 if quick else 50, "sample length": 32 if quick else 128,
        "refit sequences": 2 if quick else 16, "refit length": 64 if quick else 512,
        "measured tokens": 512 if quick else 8192,
    }  # fmt: skip


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    """One estimation for each element order is shared by all cells."""
    chosen, dense = settings(request), open_dense(request.model)
    samples = SampleRequest("scored", chosen["samples"], chosen["sample length"])
    tokens = draw(
        dense, VALIDATION, [samples, SampleRequest("refit", chosen["refit sequences"], chosen["refit length"])], seed=0
    )
    text = measured_text(dense, "wikitext2", chosen["measured tokens"])
    estimates: dict[ElementOrder, Any] = {}
    with quick_float32_products():
        whole = dense.perplexity(text)
        for cell in wanted:
            strategy, importance = CHOICES[cell]
            order = ORDERS.get(importance, ElementOrder.SECOND)
            if order not in estimates:
                estimates[order] = estimate(
                    Backend(dense.model, dense.graph), tokens["scored"], roles=[Role.FFN], element_order=order
                )
            units = unit_scores(estimates[order], dense.graph, importance, FusionScope.LAYER_ROLE)
            plan = plan_for(dense, units, RATIO, strategy)
            without = masked_perplexity(dense, plan, text)
            model = copy.deepcopy(dense.model)
            refit = on_device(tokens["refit"], model)
            reconstruct(Backend(model, dense.graph), plan, refit, ReconstructionSettings(second_order=False))
            cut(model, dense.graph, plan)
            restored = dense.perplexity(text, model)
            yield cell, {"ratio_without_restoration": without / whole, "ratio_with_restoration": restored / whole}


def summarise(cells: Cells) -> dict[str, Any]:
    rows = [
        {"strategy": str(strategy), "importance": str(importance), **cells[name]}
        for name, (strategy, importance) in CHOICES.items()
    ]
    usual = [row for row in rows if not row["strategy"].startswith("volatility")]
    literal = [row for row in rows if row["strategy"].startswith("volatility")]
    figure = "ratio_with_restoration"
    return {
        "rows": rows,
        "usual": [min(row[figure] for row in usual), max(row[figure] for row in usual)],
        "literal": [min(row[figure] for row in literal), max(row[figure] for row in literal)],
    }


EXPERIMENT = Experiment(
    name="selection", cells=lambda request: list(CHOICES), settings=settings, measure=measure, summarise=summarise
)
