"""The paper's break conditions: what a unit's removal does, measured unit by unit, against every indicator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from harness.charts import bars
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import VALIDATION
from lab.dense import Dense, draw, on_device, open_dense
from lab.effects import RemovalEffects, sampled_units, spread_layers
from lab.indicators import FLUCTUATION, FUSED, STABILITY, all_estimates, all_indicators, residuals
from lab.measures import (
    correlation_interval,
    rank_correlation_inside,
    rank_correlation_overall,
    reliability,
)

from saap.core.records import CoupledGroup, FloatArray, Role
from saap.data.placement import SampleRequest
from saap.models.loading.devices import quick_float32_products
from saap.reporting.figures import Figure
from saap.settings.prune import ElementOrder

ROLES = ("ffn", "attention")


def settings(request: Request) -> Values:
    quick = request.quick
    return {
        "model": request.model, "calibration": VALIDATION, "seed": 0,
        "samples": 4 if quick else 50, "sample length": 32 if quick else 128,
        "samples of the effect": 2 if quick else 16,
        "FFN layers": 2 if quick else 10, "FFN units of a layer": 4 if quick else 32,
        "attention layers": 2 if quick else 30,
    }  # fmt: skip


def cells(request: Request) -> Sequence[str]:
    chosen = settings(request)
    ffn = [f"ffn-{index:02d}" for index in range(chosen["FFN layers"])]
    return ("indicators", *ffn, *(f"attention-{index:02d}" for index in range(chosen["attention layers"])))


def groups_of(dense: Dense, chosen: Values) -> dict[str, CoupledGroup]:
    """The group of each cell: evenly spread over the layers that have one of the role."""
    found: dict[str, CoupledGroup] = {}
    for role, layers in ((Role.FFN, chosen["FFN layers"]), (Role.ATTENTION, chosen["attention layers"])):
        groups = dense.graph.of_role(role)
        places = spread_layers(len(groups), layers) if groups else []
        found |= {f"{role}-{index:02d}": groups[place] for index, place in enumerate(places)}
    return found


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    chosen = settings(request)
    dense = open_dense(request.model)
    drawn = draw(
        dense, VALIDATION,
        [
            SampleRequest("scored", chosen["samples"], chosen["sample length"]),
            SampleRequest("held", chosen["samples of the effect"], chosen["sample length"], held_out=True),
        ], seed=0,
    )  # fmt: skip
    groups = groups_of(dense, chosen)
    units = {
        cell: sampled_units(group.units, chosen["FFN units of a layer"], seed=group.layer)
        for cell, group in groups.items()
    }
    with quick_float32_products():
        for name in wanted:
            if name == "indicators":
                estimates = all_estimates(dense, drawn["scored"])
                every = all_indicators(dense, drawn["scored"], estimates)
                yield (
                    name,
                    {
                        "indicators": {
                            indicator: {
                                cell: values[group.name][units[cell]].tolist() for cell, group in groups.items()
                            }
                            for indicator, values in every.items()
                        },
                        "residuals": residuals(estimates[ElementOrder.SECOND]),
                    },
                )
            elif name in groups:
                yield name, effects_of(dense, groups[name], units[name], drawn["held"])
            else:
                yield name, {"units": [], "loss": [], "divergence": []}


def effects_of(dense: Dense, group: CoupledGroup, units: Sequence[int], held: Any) -> Values:
    """Loss change and divergence of removing each of the units, over either half of the samples."""
    effects = RemovalEffects(dense.model, dense.graph, group.layer, on_device(held, dense.model))
    found = [effects.of(group.name, unit) for unit in units]
    return {
        "group": group.name,
        "units": list(units),
        "loss": [halves(effect.loss) for effect in found],
        "divergence": [halves(effect.divergence) for effect in found],
    }


def halves(by_sample: FloatArray) -> list[float]:
    """Means over every other sample and over the rest: their mean is that over all, their agreement its reliability."""
    return [float(by_sample[::2].mean()), float(by_sample[1::2].mean())]


def summarise(cells: Cells) -> dict[str, Any]:
    indicators = cells["indicators"]["indicators"]
    found: dict[str, Any] = {"residuals": cells["indicators"]["residuals"], "roles": {}, "seeds": [0]}
    for role in ROLES:
        measured = {name: cell for name, cell in cells.items() if name.startswith(role) and cell["units"]}
        if measured:
            found["roles"][role] = role_summary(measured, indicators)
    ffn = found["roles"]["ffn"]["indicators"]
    best = max((name for name in ffn), key=lambda name: ffn[name]["divergence"])
    found |= {
        "best": best,
        "best_correlation": ffn[best]["divergence"],
        "best_interval": ffn[best]["interval"],
        "fused": ffn[FUSED]["divergence"],
        "fluctuation": ffn[FLUCTUATION]["divergence"],
        "stability": {name: ffn[name]["divergence"] for name in STABILITY},
        "assumed_variation": math.sqrt(2),
        "units": sum(role["units"] for role in found["roles"].values()),
    }
    return found


def role_summary(measured: Cells, indicators: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Rank correlations of every indicator with the effects of one role, inside the modules and over all units."""
    loss = {name: np.array(cell["loss"]) for name, cell in measured.items()}
    apart = {name: np.array(cell["divergence"]) for name, cell in measured.items()}
    table: dict[str, dict[str, Any]] = {}
    for indicator, values in indicators.items():
        scores = {name: np.array(values[name]) for name in measured}
        with_divergence = [(scores[name], apart[name].mean(1)) for name in measured]
        table[indicator] = {
            "divergence": rank_correlation_inside(with_divergence),
            "interval": list(correlation_interval(with_divergence)),
            "divergence_overall": rank_correlation_overall(with_divergence),
            "loss": rank_correlation_inside([(scores[name], loss[name].mean(1)) for name in measured]),
        }
    return {
        "units": sum(len(values) for values in loss.values()),
        "modules": len(measured),
        "indicators": dict(sorted(table.items(), key=lambda item: -item[1]["divergence"])),
        "ceiling_loss": _ceiling(loss),
        "ceiling_divergence": _ceiling(apart),
        "loss_falls": float(np.mean(np.concatenate([values.mean(1) for values in loss.values()]) < 0)),
    }


def _ceiling(effects: Mapping[str, Any]) -> float:
    """What a perfect indicator could reach, as the effect itself is measured on few samples."""
    return float(np.mean([reliability(one[:, 0], one[:, 1]) for one in effects.values()]))


def figures(summary: Values) -> Sequence[Figure]:
    return [
        bars(
            f"break-conditions-{role}", f"Which indicator predicts the true effect: {role}",
            f"Rank correlation of each indicator with the divergence that a unit's removal causes, {role}.",
            {"inside the modules": [one["divergence"] for one in found["indicators"].values()]},
            list(found["indicators"]), x="rank correlation",
            errors={"inside the modules": [tuple(one["interval"]) for one in found["indicators"].values()]},
        )
        for role, found in summary["roles"].items()
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="break-conditions", cells=cells, settings=settings, measure=measure, summarise=summarise, figures=figures
)
