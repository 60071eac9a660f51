"""The paper's break conditions: effect of removing single units, compared with every indicator."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from harness.charts import bars
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab import measures
from lab.commands import VALIDATION
from lab.dense import Dense, opened
from lab.measures import rank_correlation_inside, rank_correlation_overall
from torch import Tensor, nn

from saap.baselines.baseline import Measurements
from saap.core.records import CalibrationSet, CoupledGroup, FloatArray, ImportanceScores, ModelGraph, Role
from saap.estimation.estimate import estimate, unit_scores
from saap.estimation.fusion import fuse
from saap.models.structure.masking import masked
from saap.settings.prune import ElementOrder, FusionScope
from saap.settings.registry import Importance, Method
from saap.structure_search.strategies import relative_volatility, standardised_fluctuation

LAYERS = {Role.FFN: "FFN layers", Role.ATTENTION: "attention layers"}
"""Settings by role."""
BASELINE_METHODS = (Method.MAGNITUDE, Method.WANDA_SP, Method.FLAP, Method.RANDOM)
ELEMENTS = {
    "element-wise, order 1": ElementOrder.FIRST,
    "element-wise, order 2": ElementOrder.SECOND,
    "element-wise, mixed": ElementOrder.MIXED,
}
SETTINGS = {
    "model": "{model}", "calibration": VALIDATION, "seed": 0,
    "samples": Scaled(4, 50), "sample length": Scaled(32, 128), "samples of the effect": Scaled(2, 16),
    "FFN layers": Scaled(2, 10), "FFN units of a layer": Scaled(4, 32), "attention layers": Scaled(2, 30),
}  # fmt: skip


def cells(request: Request) -> Names:
    layers = {role: range(request.settings[name]) for role, name in LAYERS.items()}
    return ["indicators", *(f"{role}-{index:02d}" for role, numbers in layers.items() for index in numbers)]


def groups_of(dense: Dense, chosen: Values) -> dict[str, CoupledGroup]:
    """The group of each cell: evenly spaced over the layers with a group of the role."""
    found: dict[str, CoupledGroup] = {}
    for role, name in LAYERS.items():
        groups = dense.graph.of_role(role)
        places = measures.spread_layers(len(groups), chosen[name]) if groups else []
        found |= {f"{role}-{index:02d}": groups[place] for index, place in enumerate(places)}
    return found


def measure(request: Request, wanted: Names) -> Measured:
    chosen = request.settings
    with opened(request.model) as dense:
        length, most = chosen["sample length"], chosen["FFN units of a layer"]
        held = chosen["samples of the effect"], length
        drawn = dense.samples(VALIDATION, scored=(chosen["samples"], length), held=held)
        groups = groups_of(dense, chosen)
        units = {cell: measures.sampled_units(one.units, most, seed=one.layer) for cell, one in groups.items()}
        effects = RemovalEffects(dense.model, dense.graph, dense.ids(drawn["held"]))
        for name in wanted:
            if name == "indicators":
                scored = drawn["scored"]
                estimates = {one: estimate(dense.backend, scored, element_order=one) for one in ELEMENTS.values()}
                indicators = {
                    indicator: {cell: values[one.name][units[cell]].tolist() for cell, one in groups.items()}
                    for indicator, values in all_indicators(dense, scored, estimates).items()
                }
                yield name, {"indicators": indicators, "residuals": residuals(estimates[ElementOrder.SECOND])}
                continue
            # two means, over every other sample and over the rest: their agreement is the reliability
            found: dict[str, list[list[float]]] = {"loss": [], "divergence": []}
            for unit in units.get(name, ()):
                for effect, by_sample in zip(found, effects.of(groups[name].name, unit), strict=True):
                    found[effect].append([float(by_sample[::2].mean()), float(by_sample[1::2].mean())])
            yield name, {"group": groups[name].name if name in groups else None, "units": units.get(name, []), **found}


def all_indicators(
    dense: Dense, tokens: CalibrationSet, estimates: Mapping[ElementOrder, ImportanceScores]
) -> dict[str, Mapping[str, FloatArray]]:
    graph, scores, ids = dense.graph, estimates[ElementOrder.SECOND], dense.ids(tokens)
    fused = fuse(scores, graph, FusionScope.LAYER_ROLE)
    scope = FusionScope.GLOBAL
    elements = {n: unit_scores(estimates[one], graph, Importance.ELEMENT2, scope) for n, one in ELEMENTS.items()}
    measured = Measurements(dense.backend, ids)
    others = {method: measured.scores(method.load()) for method in BASELINE_METHODS}
    return {
        "vector-wise": {n: g.vector for n, g in scores.groups.items()},
        **{name: {n: u.mean for n, u in units.items()} for name, units in elements.items()},
        "fused": {n: u.mean for n, u in fused.items()},
        "fluctuation": {n: u.variance for n, u in fused.items()},
        "volatility-z": {n: standardised_fluctuation(u.variance) for n, u in fused.items()},
        "volatility-cv": {n: relative_volatility(u.mean, u.variance) for n, u in fused.items()},
        "second-order cost": dict(dense.second_order_costs(ids).scores),
        **{str(method): {n: np.asarray(v, np.float64) for n, v in scored.items()} for method, scored in others.items()},
    }


def residuals(scores: ImportanceScores) -> dict[str, dict[str, float]]:
    """Deviation of the importances from the assumptions of uncertainty weighting, by granularity; means over modules.

    distance: Kolmogorov-Smirnov distance of importance / mean from chi-square with one degree of freedom. variation:
    standard deviation over mean, sqrt(2) under the assumption. slope: of log variance over samples against log mean of
    the units, 0 under the assumption.
    """
    found = {}
    for name in ("vector", "element"):
        means = [getattr(group, name) for group in scores.groups.values()]
        spreads = [getattr(group, f"{name}_m2") / (scores.samples - 1) for group in scores.groups.values()]
        slopes = [measures.variance_slope(mean, spread) for mean, spread in zip(means, spreads, strict=True)]
        found[name] = {
            "distance": float(np.mean([measures.chi_square_distance(mean) for mean in means])),
            "variation": float(np.mean([mean.std() / mean.mean() for mean in means if mean.mean() > 0])),
            "slope": float(np.nanmean(slopes)),
        }
    return found


class RemovalEffects:
    """Removes units one at a time, and measures what that changes. tokens: (samples, length) ids."""

    def __init__(self, model: nn.Module, graph: ModelGraph, tokens: Tensor) -> None:
        self._model, self._graph, self._tokens = model, graph, tokens
        with torch.no_grad():
            self._dense = [self._predictions(ids) for ids in tokens]

    def of(self, group: str, unit: int) -> tuple[FloatArray, FloatArray]:
        """Effect of removing `unit` of `group` by sample, in nats per predicted token.

        Returns two arrays (samples,): the change of the mean negative log-likelihood, and the divergence of the
        predictions from the dense model's.
        """
        kept = tuple(other for other in range(self._graph.group(group).units) if other != unit)
        loss, divergence = [], []
        with torch.no_grad(), masked(self._model, self._graph, {group: kept}):
            for ids, dense in zip(self._tokens, self._dense, strict=True):
                logs = self._predictions(ids)
                loss.append(float((dense - logs).gather(-1, ids[1:, None]).double().mean()))
                apart = nn.functional.kl_div(logs, dense, log_target=True, reduction="sum")
                divergence.append(float(apart) / len(dense))
        return np.array(loss), np.array(divergence)

    def _predictions(self, ids: Tensor) -> Tensor:
        """Log-probabilities of the next token: (length - 1, vocabulary)."""
        logits: Tensor = self._model(ids[None], use_cache=False).logits
        return logits[0, :-1].float().log_softmax(-1)


def summarise(cells: Cells) -> Values:
    roles = {}
    for role in map(str, LAYERS):
        measured = {name: cell for name, cell in cells.items() if name.startswith(role) and cell["units"]}
        if measured:
            roles[role] = role_summary(measured, cells["indicators"]["indicators"])
    return {
        "residuals": cells["indicators"]["residuals"], "roles": roles, "best": next(iter(roles["ffn"]["indicators"])),
        "assumed_variation": math.sqrt(2), "units": sum(role["units"] for role in roles.values()),
    }  # fmt: skip


def role_summary(measured: Cells, indicators: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Rank correlations of every indicator with the effects of one role, inside the modules and over all units.

    The ceilings are the correlations of a perfect indicator, since the effect itself is measured on few samples.
    """
    effects = {name: {c: np.array(one[name]) for c, one in measured.items()} for name in ("loss", "divergence")}
    table: dict[str, dict[str, Any]] = {}
    for indicator, values in indicators.items():
        with_loss, with_divergence = (
            [(np.array(values[cell]), each[cell].mean(1)) for cell in measured] for each in effects.values()
        )
        table[indicator] = {
            "divergence": rank_correlation_inside(with_divergence), "loss": rank_correlation_inside(with_loss),
            "interval": list(measures.correlation_interval(with_divergence)),
            "divergence_overall": rank_correlation_overall(with_divergence),
        }  # fmt: skip
    ceilings = {}
    for name, found in effects.items():
        reliable = [measures.reliability(each[:, 0], each[:, 1]) for each in found.values()]
        ceilings[f"ceiling_{name}"] = float(np.mean(reliable))
    return {
        "units": sum(len(each) for each in effects["loss"].values()), "modules": len(measured), **ceilings,
        "indicators": dict(sorted(table.items(), key=lambda item: -item[1]["divergence"])),
        "loss_falls": float(np.mean(np.concatenate([each.mean(1) for each in effects["loss"].values()]) < 0)),
    }  # fmt: skip


def figures(summary: Values) -> Figures:
    drawn = []
    for role, found in summary["roles"].items():
        indicators = found["indicators"]
        values = {"inside the modules": [one["divergence"] for one in indicators.values()]}
        errors = {"inside the modules": [tuple(one["interval"]) for one in indicators.values()]}
        drawn.append(bars(f"break-conditions-{role}", values, list(indicators), x="rank correlation", errors=errors))
    return drawn
