"""Other families: small models that the benchmark trains itself, pruned by our method and by the baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.charts import bars
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import compared
from lab.training import FAMILIES, FULL, TRIAL, trained_folder

from saap.reporting.figures import Figure

METHODS = (
    "saap",
    "llm-pruner-element2@ffn",
    "llm-pruner-vector@ffn",
    "flap",
    "wanda-sp@ffn",
    "magnitude@ffn",
    "random@ffn",
)
TEXT = "benchmarks/data/novel.txt.gz"
RATIOS = (0.2, 0.5)
"""The second one, because models that were trained for minutes hardly miss a fifth of their channels."""
STATES = {"cut": False, "restored": True}


def settings(request: Request) -> Values:
    size = TRIAL if request.quick else FULL
    return {
        "families": list(FAMILIES), "methods": list(METHODS), "pruning ratios": list(RATIOS), "calibration": "novels",
        "measured on": TEXT, "measured tokens": 1024 if request.quick else 16384,
        "samples": 8 if request.quick else 50, "refit tokens": 1024 if request.quick else 16384,
        "layers": size.layers, "width": size.width, "FFN": size.inner, "seed": 0,
        "training": f"{size.steps} steps of {size.batch} x {size.length} tokens of the bundled texts",
        "effort": "fast" if request.quick else "default",
    }  # fmt: skip


def cells(request: Request) -> Sequence[str]:
    return FAMILIES


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    chosen = settings(request)
    for family in wanted:
        folder = trained_folder(request, family)
        found = compared(
            str(folder), {"both": METHODS}, "--pruning-ratios", ",".join(map(str, RATIOS)),
            "--calibration", chosen["calibration"], "--samples", chosen["samples"], "--sample-length", 64,
            "--refit-tokens", chosen["refit tokens"], "--effort", chosen["effort"], "--align", 16,
            "--perplexity", TEXT, "--window", 128, "--max-tokens", chosen["measured tokens"],
        )  # fmt: skip
        (dense,) = found["dense"]["perplexity"].values()
        yield family, {
            "parameters": found["dense"]["parameters"],
            "perplexity": dense["value"],
            "rows": [
                {
                    "method": row["method"], "restored": row["restored"], "removed": row["pruning_ratio"],
                    "ratio": next(iter(row["ratios"].values())),
                }
                for row in found["rows"]
            ],
        }  # fmt: skip


def summarise(cells: Cells) -> dict[str, Any]:
    ratios = {f"{100 * ratio:.0f} %": ratio for ratio in RATIOS}
    families = {}
    for family, cell in cells.items():
        found = {name: _at(ratio, cell["rows"]) for name, ratio in ratios.items()}
        families[family] = {"perplexity": cell["perplexity"], "parameters": cell["parameters"], "at": found}
    summary = {}
    for name in ratios:
        of_ratio = [one["at"][name] for one in families.values()]
        summary[name] = {state: _over_families([one["quotient"][state] for one in of_ratio]) for state in STATES}
    return {
        "families": families,
        "ratios": ratios,
        "over_families": summary,
        "most": list(ratios)[-1],
        "count": len(families),
        "seeds": [0],
    }


def _at(ratio: float, rows: Sequence[Values]) -> dict[str, Any]:
    """What the methods give at one ratio, and ours over the best of the others."""
    near = [row for row in rows if min(RATIOS, key=lambda one: abs(one - row["removed"])) == ratio]
    table = {
        method: {
            state: next(row["ratio"] for row in near if row["method"] == method and row["restored"] == restored)
            for state, restored in STATES.items()
        }
        for method in METHODS
    }
    others = METHODS[1:]
    best = {state: min(others, key=lambda method: table[method][state]) for state in STATES}
    quotient = {state: table["saap"][state] / table[name][state] for state, name in best.items()}
    return {"table": table, "best_baseline": best, "quotient": quotient}


def _over_families(quotients: Sequence[float]) -> dict[str, Any]:
    return {"ahead": sum(quotient < 1 for quotient in quotients), "range": [min(quotients), max(quotients)]}


def figures(summary: Values) -> Sequence[Figure]:
    families, most = list(summary["families"]), summary["most"]
    drawn = []
    for state, label in (("cut", "cut only"), ("restored", "restored")):
        values = {
            method: [summary["families"][family]["at"][most]["table"][method][state] for family in families]
            for method in METHODS
        }
        drawn.append(
            bars(
                f"families-{state}", f"{most} removed, {label}",
                f"Perplexity of the pruned over that of the dense model by family and method, {most} removed, {label}.",
                values, families, x="perplexity / dense",
            )
        )  # fmt: skip
    return drawn


EXPERIMENT = Experiment(
    name="families", cells=cells, settings=settings, measure=measure, summarise=summarise, figures=figures
)
