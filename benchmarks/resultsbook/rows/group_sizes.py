"""Group sizes of the quantised tuning: perplexity, memory, time, size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resultsbook.charts import lines
from resultsbook.row import Cells, Row, Source, Values
from saap.reporting.figures import Figure

OFF_GRID = "none"


def summarise(cells: Cells) -> dict[str, Any]:
    rows = cells["sizes"]["rows"]
    grouped = [row for row in rows if row["source_grid"] == OFF_GRID and row["group_size"].isdigit()]
    plain = next(row for row in rows if row["source_grid"] == OFF_GRID and not row["group_size"].isdigit())
    best, largest = (
        min(grouped, key=lambda row: row["perplexity"]),
        max(grouped, key=lambda row: int(row["group_size"])),
    )
    return {
        "rows": rows,
        "tokens": cells["sizes"]["tokens"],
        "best": best,
        "largest": largest,
        "plain": plain,
        "plain_perplexity": {row["source_grid"]: row["perplexity"] for row in rows if not row["group_size"].isdigit()},
        "best_over_plain": best["perplexity"] / plain["perplexity"],
        "largest_over_best": largest["perplexity"] / best["perplexity"],
        "bytes_saved": 1 - largest["weight_bytes"] / best["weight_bytes"],
        "cost": cells["cost"]["rows"],
    }


def figures(summary: Values) -> Sequence[Figure]:
    series = {}
    for grid in dict.fromkeys(row["source_grid"] for row in summary["rows"]):
        rows = [row for row in summary["rows"] if row["source_grid"] == grid and row["group_size"].isdigit()]
        plain = summary["plain_perplexity"][grid]
        places = [float(row["group_size"]) for row in rows]
        series[f"tuned, grid: {grid}"] = (places, [row["perplexity"] / plain for row in rows])
        series[f"only quantised, grid: {grid}"] = (places, [row["perplexity_quantised"] / plain for row in rows])
    figure = lines(
        "group-sizes", "Perplexity against the group size",
        "Perplexity on WikiText-2 of the quantised model, over that of plain LoRA on the same weights, against the "
        "number of inputs that share a scale.",
        series, x="inputs that share a scale and a zero point", y="perplexity / plain LoRA", log="x", ticks=True,
    )  # fmt: skip
    return (figure,)


ROW = Row(
    name="group-sizes",
    title="Group sizes of the quantised tuning",
    question="What do groups of 16, 32, 64 and 128 inputs cost in perplexity, and what do they save?",
    summarise=summarise,
    figures=figures,
    sources={
        "sizes": Source(file="recovery-sizes.json", command="python benchmarks/recovery.py sizes"),
        "cost": Source(file="recovery-cost.json", command="python benchmarks/recovery.py cost PRUNED", by_hand=True),
    },
    limits="Zero-shot accuracy and speed in llama.cpp, which has a type for 32 only, are not measured by group size.",
)
