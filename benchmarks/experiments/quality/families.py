"""Other families: small models that the benchmark trains itself, pruned by our method and by the baselines."""

from collections.abc import Sequence
from typing import Any

from harness.charts import bars
from harness.digests import PRUNING
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.commands import compared, flags_from
from lab.training import FAMILIES, FULL, TRIAL, trained_folder

METHODS = (
    "saap", "llm-pruner-element2@ffn", "llm-pruner-vector@ffn", "flap", "wanda-sp@ffn", "magnitude@ffn", "random@ffn",
)  # fmt: skip
TEXT = "benchmarks/data/novel.txt.gz"
RATIOS = {"20 %": 0.2, "50 %": 0.5}
"""Includes 50 %, since models trained for minutes hardly lose quality at 20 %."""
STATES = {"cut": False, "restored": True}
CELLS = FAMILIES
SIZES = (TRIAL, FULL)
SETTINGS = {
    "families": list(FAMILIES), "methods": list(METHODS), "pruning ratios": list(RATIOS.values()),
    "calibration": "novels", "measured on": TEXT, "measured tokens": Scaled(1024, 16384),
    "samples": Scaled(8, 50), "refit tokens": Scaled(1024, 16384),
    "layers": Scaled(TRIAL.layers, FULL.layers), "width": Scaled(TRIAL.width, FULL.width),
    "FFN": Scaled(TRIAL.inner, FULL.inner), "seed": 0,
    "training": Scaled(*(f"{s.steps} steps of {s.batch} x {s.length} tokens of the bundled texts" for s in SIZES)),
    "effort": Scaled("fast", "default"),
}  # fmt: skip
DECIDED_BY = (*PRUNING, "baselines", "pipeline/compare")


def measure(request: Request, wanted: Names) -> Measured:
    flags = flags_from(request.settings)
    flags += ["--pruning-ratio", ",".join(map(str, RATIOS.values())), "--sample-length", "64", "--align", "16"]
    for family in wanted:
        found = compared(str(trained_folder(request, family)), {"both": METHODS}, *flags, "--window", 128)
        (dense,) = found["dense"]["perplexity"].values()
        rows = [
            {"method": row["method"], "restored": row["restored"],
             "removed": row["pruning_ratio"], "ratio": row["ratios"][TEXT]}
            for row in found["rows"]
        ]  # fmt: skip
        yield family, {"parameters": found["dense"]["parameters"], "perplexity": dense["value"], "rows": rows}


def summarise(cells: Cells) -> Values:
    families: dict[str, Any] = {
        family: {**cell, "at": {name: at(ratio, cell["rows"]) for name, ratio in RATIOS.items()}}
        for family, cell in cells.items()
    }
    most = list(RATIOS)[-1]
    summary = {}
    for state in STATES:
        quotients = [one["at"][most]["quotient"][state] for one in families.values()]
        ahead = sum(quotient < 1 for quotient in quotients)
        summary[state] = {"ahead": ahead, "range": [min(quotients), max(quotients)]}
    return {
        "families": families, "ratio": RATIOS[most], "over_families": summary, "most": most, "count": len(families),
    }  # fmt: skip


def at(ratio: float, rows: Sequence[Values]) -> Values:
    near = [row for row in rows if min(RATIOS.values(), key=lambda one: abs(one - row["removed"])) == ratio]
    found = {(row["method"], row["restored"]): row["ratio"] for row in near}
    table = {m: {state: found[m, restored] for state, restored in STATES.items()} for m in METHODS}
    quotient = {s: table["saap"][s] / min(table[method][s] for method in METHODS[1:]) for s in STATES}
    return {"table": table, "quotient": quotient}


def figures(summary: Values) -> Figures:
    families = summary["families"]
    tables = [one["at"][summary["most"]]["table"] for one in families.values()]
    return [
        bars(
            f"families-{state}", {method: [table[method][state] for table in tables] for method in METHODS},
            list(families), x="perplexity / dense",
        )
        for state in STATES
    ]  # fmt: skip
