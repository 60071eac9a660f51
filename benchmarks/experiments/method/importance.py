"""Importance before and after fusion: distributions, orders, perplexity, scopes, and cost of the fusion."""

import statistics
import time
import timeit
import tracemalloc
from collections.abc import Mapping
from functools import partial

import numpy as np
from harness.charts import bars, lines
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.commands import VALIDATION
from lab.dense import Dense, Units, opened, wikitext2
from lab.measures import jaccard, log_histogram, rank_correlation_inside, rank_correlation_overall, removed_units

from saap.core.records import ImportanceScores, Role
from saap.estimation.estimate import estimate, unit_scores
from saap.estimation.fusion import closed_form_sigma, fuse, learned_sigma
from saap.settings.prune import FusionScope
from saap.settings.registry import Importance, Strategy

RATIO = 0.2
EDGES = np.linspace(-4, 2, 25)
"""Bin edges of log10(importance / mean): almost no values are below -4 or above 2."""
UNFUSED = {"vector-wise": Importance.VECTOR, "element-wise": Importance.ELEMENT2}
STRATEGIES = (Strategy.UNIFORM, Strategy.IMPORTANCE)
ROUNDS = 9


FUSED = {f"fused-{scope}": scope for scope in FusionScope}
CELLS = ["distributions", "cost", *(f"perplexity-{name}" for name in (*UNFUSED, *FUSED))]
SETTINGS = {
    "model": "{model}", "calibration": VALIDATION, "seed": 0, "pruning ratio": RATIO,
    "samples": Scaled(8, 50), "sample length": 128, "measured tokens": Scaled(1024, 8192),
}  # fmt: skip


def measure(request: Request, wanted: Names) -> Measured:
    chosen = request.settings
    with opened(request.model) as dense:
        tokens = dense.samples(VALIDATION, scored=(chosen["samples"], chosen["sample length"]))["scored"]
        start = time.perf_counter()
        scores = estimate(dense.backend, tokens)
        seconds = time.perf_counter() - start
        every: dict[str, Units] = {
            **{name: unit_scores(scores, dense.graph, kind, FusionScope.GLOBAL) for name, kind in UNFUSED.items()},
            **{name: fuse(scores, dense.graph, scope) for name, scope in FUSED.items()},
        }
        ratios = wikitext2(dense, chosen["measured tokens"])
        for name in wanted:
            if name == "distributions":
                yield name, distributions(dense, every)
            elif name == "cost":
                yield name, {"estimation_seconds": seconds, **fusion_cost(dense, scores)}
            else:
                units = every[name.removeprefix("perplexity-")]
                plans = {str(strategy): dense.plan(units, RATIO, strategy) for strategy in STRATEGIES}
                yield name, {strategy: ratios.masked(plan)["wikitext2"] for strategy, plan in plans.items()}


def distributions(dense: Dense, every: Mapping[str, Units]) -> Values:
    """Histograms by role, rank correlations with the element-wise score, and overlaps of removed units."""
    histograms, correlation = {}, {}
    reference = every["element-wise"]
    for role in (Role.FFN, Role.ATTENTION):
        names = [group.name for group in dense.graph.of_role(role) if group.name in reference]
        if names:
            means = {kind: np.concatenate([units[name].mean for name in names]) for kind, units in every.items()}
            histograms[str(role)] = {kind: log_histogram(mean / mean.mean(), EDGES) for kind, mean in means.items()}
            pairs = {kind: [(u[name].mean, reference[name].mean) for name in names] for kind, u in every.items()}
            correlation[str(role)] = {
                kind: {"inside": rank_correlation_inside(both), "overall": rank_correlation_overall(both)}
                for kind, both in pairs.items()
            }
    removed = {name: removed_units(dense.plan(units, RATIO), dense.graph) for name, units in every.items()}
    overlap = {kind: jaccard(units, removed["element-wise"]) for kind, units in removed.items()}
    return {"edges": EDGES.tolist(), "histograms": histograms, "correlation": correlation, "overlap": overlap}


def fusion_cost(dense: Dense, scores: ImportanceScores) -> Values:
    """Time and memory of only the fusion. peak_bytes: of new arrays."""
    ways = {"closed": closed_form_sigma, "learned": learned_sigma}
    calls = {f"{name}_seconds": partial(fuse, scores, dense.graph, sigma_of=one) for name, one in ways.items()}
    found = {name: statistics.median(timeit.repeat(call, repeat=ROUNDS, number=1)) for name, call in calls.items()}
    tracemalloc.start()
    fuse(scores, dense.graph)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    weights = sum(parameter.nbytes for parameter in dense.model.parameters())
    return {**found, "peak_bytes": peak, "weight_bytes": weights}


def summarise(cells: Cells) -> Values:
    ratios = {name.removeprefix("perplexity-"): v for name, v in cells.items() if name.startswith("perplexity")}
    ranked = {name.removeprefix("fused-"): v["importance"] for name, v in ratios.items() if name.startswith("fused")}
    best, worst = min(ranked, key=lambda scope: ranked[scope]), max(ranked, key=lambda scope: ranked[scope])
    cost = cells["cost"]
    return {
        **cells["distributions"], "ratios": ratios, "cost": cost,
        "best_global_scope": best, "worst_global_scope": worst,
        "closed_share": cost["closed_seconds"] / cost["estimation_seconds"],
        "learned_over_closed": cost["learned_seconds"] / cost["closed_seconds"],
        "memory_share": cost["peak_bytes"] / cost["weight_bytes"],
    }  # fmt: skip


def figures(summary: Values) -> Figures:
    edges, ratios = np.asarray(summary["edges"]), summary["ratios"]
    middle = (10 ** ((edges[1:] + edges[:-1]) / 2)).tolist()
    drawn = []
    for role, shares in summary["histograms"].items():
        series = {kind: (middle, shares[kind]) for kind in ("vector-wise", "element-wise", "fused-layer-role")}
        drawn.append(lines(f"importance-{role}", series, x="importance / mean", y="share of the units", log="x"))
    values = {str(strategy): [one[strategy] for one in ratios.values()] for strategy in STRATEGIES}
    return [*drawn, bars("importance-perplexity", values, list(ratios), x="perplexity / dense")]
