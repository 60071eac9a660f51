"""Importance before and after the fusion: distributions, orders, perplexity, scopes, and what the fusion costs."""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from harness.charts import bars, lines
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import VALIDATION
from lab.dense import Dense, draw, masked_perplexity, measured_text, open_dense, plan_for, removed_units
from lab.measures import jaccard, log_histogram, rank_correlation_inside, rank_correlation_overall

from saap.core.records import FloatArray, ImportanceScores, Role, UnitScores
from saap.data.placement import SampleRequest
from saap.estimation.estimate import estimate, unit_scores
from saap.estimation.fusion import closed_form_sigma, fuse, learned_sigma
from saap.models.loading.devices import quick_float32_products
from saap.models.walk.backend import Backend
from saap.reporting.figures import Figure
from saap.settings.prune import FusionScope
from saap.settings.registry import Importance, Strategy

RATIO = 0.2
EDGES = np.linspace(-4, 2, 25)
"""Of log10 of the importance over its mean: below -4 and above 2 there is next to nothing."""
UNFUSED = {"vector-wise": Importance.VECTOR, "element-wise": Importance.ELEMENT2}
STRATEGIES = (Strategy.UNIFORM, Strategy.IMPORTANCE)
Units = Mapping[str, UnitScores]


def cells(request: Request) -> Sequence[str]:
    scopes = [f"fused-{scope}" for scope in FusionScope]
    return ("distributions", "cost", *(f"perplexity-{name}" for name in (*UNFUSED, *scopes)))


def settings(request: Request) -> Values:
    return {
        "model": request.model, "calibration": VALIDATION, "seed": 0, "pruning ratio": RATIO,
        "samples": 8 if request.quick else 50, "sample length": 128,
        "measured tokens": 1024 if request.quick else 8192,
    }  # fmt: skip


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    chosen = settings(request)
    dense = open_dense(request.model)
    samples = SampleRequest("scored", chosen["samples"], chosen["sample length"])
    tokens = draw(dense, VALIDATION, [samples], seed=0)["scored"]
    with quick_float32_products():
        start = time.perf_counter()
        scores = estimate(Backend(dense.model, dense.graph), tokens)
        seconds = time.perf_counter() - start
        every = all_importances(dense, scores)
        text = measured_text(dense, "wikitext2", chosen["measured tokens"])
        whole = dense.perplexity(text) if any("perplexity" in name for name in wanted) else 0.0
        for name in wanted:
            if name == "distributions":
                yield name, distributions(dense, every)
            elif name == "cost":
                yield name, fusion_cost(dense, scores, seconds)
            else:
                units = every[name.removeprefix("perplexity-")]
                plans = {strategy: plan_for(dense, units, RATIO, strategy) for strategy in STRATEGIES}
                yield name, {str(s): masked_perplexity(dense, plan, text) / whole for s, plan in plans.items()}


def all_importances(dense: Dense, scores: ImportanceScores) -> dict[str, Units]:
    """Every importance of every unit: both granularities, and their fusion in every scope."""
    plain = {name: unit_scores(scores, dense.graph, kind, FusionScope.GLOBAL) for name, kind in UNFUSED.items()}
    return {**plain, **{f"fused-{scope}": fuse(scores, dense.graph, scope) for scope in FusionScope}}


def distributions(dense: Dense, every: Mapping[str, Units]) -> dict[str, Any]:
    """Histograms by role, rank correlations with the element-wise score, and overlaps of what would leave."""
    found: dict[str, Any] = {"edges": EDGES.tolist(), "histograms": {}, "correlation": {}, "overlap": {}}
    plans = {name: removed_units(plan_for(dense, units, RATIO), dense.graph) for name, units in every.items()}
    for role in (Role.FFN, Role.ATTENTION):
        names = [group.name for group in dense.graph.of_role(role) if group.name in every["vector-wise"]]
        if not names:
            continue
        found["histograms"][str(role)] = {
            kind: log_histogram(relative(units, names), EDGES) for kind, units in every.items()
        }
        reference = every["element-wise"]
        pairs = {kind: [(units[name].mean, reference[name].mean) for name in names] for kind, units in every.items()}
        found["correlation"][str(role)] = {
            kind: {"inside": rank_correlation_inside(both), "overall": rank_correlation_overall(both)}
            for kind, both in pairs.items()
        }
    found["overlap"] = {kind: jaccard(units, plans["element-wise"]) for kind, units in plans.items()}
    return found


def relative(units: Units, names: Sequence[str]) -> FloatArray:
    """Importances of the units of all modules over their mean."""
    values = np.concatenate([units[name].mean for name in names])
    return np.asarray(values / values.mean())


def fusion_cost(dense: Dense, scores: ImportanceScores, estimation_seconds: float) -> dict[str, Any]:
    """Time and memory of the fusion alone, beside the estimation that it follows. memory: peak of new arrays."""
    found: dict[str, Any] = {"estimation_seconds": estimation_seconds}
    for name, sigma_of in {"closed": closed_form_sigma, "learned": learned_sigma}.items():
        found[f"{name}_seconds"] = _median_seconds(partial(fuse, scores, dense.graph, sigma_of=sigma_of))
    tracemalloc.start()
    fuse(scores, dense.graph)
    found["peak_bytes"] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found["weight_bytes"] = sum(p.numel() * p.element_size() for p in dense.model.parameters())
    return found


def _median_seconds(call: Callable[[], object], rounds: int = 9) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def summarise(cells: Cells) -> dict[str, Any]:
    ratios = {name.removeprefix("perplexity-"): dict(v) for name, v in cells.items() if name.startswith("perplexity")}
    fused = {name: values for name, values in ratios.items() if name.startswith("fused")}
    both = {s: (min(fused, key=lambda n: fused[n][s]), max(fused, key=lambda n: fused[n][s])) for s in STRATEGIES}
    cost = cells["cost"]
    shape = cells["distributions"]
    return {
        **shape,
        "ratios": ratios,
        "default": ratios["fused-layer-role"]["uniform"],
        "element": ratios["element-wise"]["uniform"],
        "vector": ratios["vector-wise"]["uniform"],
        "best_global": min(values["importance"] for values in fused.values()),
        "worst_global": max(values["importance"] for values in fused.values()),
        "best_global_scope": both[Strategy.IMPORTANCE][0].removeprefix("fused-"),
        "worst_global_scope": both[Strategy.IMPORTANCE][1].removeprefix("fused-"),
        "ffn": shape["correlation"]["ffn"],
        "closed_share": cost["closed_seconds"] / cost["estimation_seconds"],
        "learned_over_closed": cost["learned_seconds"] / cost["closed_seconds"],
        "memory_share": cost["peak_bytes"] / cost["weight_bytes"],
        "cost": dict(cost),
        "seeds": [0],
    }


def figures(summary: Values) -> Sequence[Figure]:
    edges = np.asarray(summary["edges"])
    middle = (10 ** ((edges[1:] + edges[:-1]) / 2)).tolist()
    drawn = []
    for role, shares in summary["histograms"].items():
        series = {kind: (middle, shares[kind]) for kind in ("vector-wise", "element-wise", "fused-layer-role")}
        drawn.append(
            lines(
                f"importance-{role}", f"Importances before and after the fusion: {role}",
                f"Shares of the units by their importance over its mean, {role}: vector-wise, element-wise and fused.",
                series, x="importance / mean", y="share of the units", log="x",
            )
        )  # fmt: skip
    names = list(summary["ratios"])
    drawn.append(
        bars(
            "importance-perplexity", "What the importance changes in perplexity",
            "Perplexity of the masked over that of the dense model by importance, equal shares and one ranking.",
            {str(s): [summary["ratios"][name][s] for name in names] for s in STRATEGIES}, names, x="perplexity / dense",
        )
    )  # fmt: skip
    return drawn


EXPERIMENT = Experiment(
    name="importance", cells=cells, settings=settings, measure=measure, summarise=summarise, figures=figures
)
