"""What the estimation costs, beside a plain training pass and beside the scores of the baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resultsbook.charts import bars
from resultsbook.row import Cells, Row, Source, Values
from saap.reporting.figures import Figure


def summarise(cells: Cells) -> dict[str, Any]:
    scored = {
        row["method"]: row["seconds"]["score"]
        for row in cells["compare"]["rows"]
        if row["ratio"] == 0.2 and not row["restored"]
    }
    quickest = min((method for method in scored if method != "saap"), key=lambda method: scored[method])
    return {
        "time_ratio": cells["estimation"]["time_ratio"],
        "memory_ratio": cells["estimation"]["memory_ratio"],
        "above_bytes": cells["estimation"]["above_bytes"],
        "weight_bytes": cells["estimation"]["weight_bytes"],
        "score_seconds": scored,
        "ours_seconds": scored["saap"],
        "quickest": quickest,
        "quickest_seconds": scored[quickest],
        "ours_over_quickest": scored["saap"] / scored[quickest],
        "samples": cells["compare"]["settings"]["samples"],
        "sample_length": cells["compare"]["settings"]["sample_length"],
    }


def figures(summary: Values) -> Sequence[Figure]:
    methods = list(summary["score_seconds"])
    figure = bars(
        "estimation-cost", "Seconds to score every unit",
        "Seconds that each method takes to score all units from the same calibration samples.",
        {"seconds": [summary["score_seconds"][method] for method in methods]}, methods, x="seconds",
    )  # fmt: skip
    return (figure,)


ROW = Row(
    name="estimation-cost",
    title="What the estimation costs",
    question="How much time and memory does the estimation take, beside a plain training pass and the baselines?",
    summarise=summarise,
    figures=figures,
    sources={
        "estimation": Source(file="estimation.json", command="python benchmarks/estimation.py smollm2 --rounds 1"),
        "compare": Source(
            file="compare/comparison.json", command="python benchmarks/compare.py --passes main --ratios 0.2"
        ),
    },
    limits="One size of model. The seconds of the methods were taken beside other work, so they are rough; "
    "a pass that several methods share counts for each of them. The estimation does not depend on the pruning ratio.",
)
