"""Group sizes of the quantised tuning: perplexity, memory, time, size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from resultsbook.charts import lines
from resultsbook.row import Cells, Row, Source, Values
from resultsbook.rows.speed import SPEED
from saap.reporting.figures import Figure

OFF_GRID = "none"
UNPACKED, PACKED = "f16", "q4_1"
"""Types of llama.cpp: of merged weights, and the one that holds groups of 32 as they are."""


def summarise(cells: Cells) -> dict[str, Any]:
    rows = cells["sizes"]["rows"]
    grouped = [row for row in rows if row["source_grid"] == OFF_GRID and row["group_size"].isdigit()]
    plain = next(row for row in rows if row["source_grid"] == OFF_GRID and not row["group_size"].isdigit())
    best, largest = (
        min(grouped, key=lambda row: row["perplexity"]),
        max(grouped, key=lambda row: int(row["group_size"])),
    )
    speed = {
        weights: {row["folder"]: row["decode_dense"] for row in cells["speed"]["rows"] if row["weights"] == weights}
        for weights in (UNPACKED, PACKED)
    }
    both = sorted(set.intersection(*map(set, speed.values())))  # measured in one run
    return {
        "rows": rows,
        "tasks": list(plain.get("tasks", {})),
        "zero_shot": {row["group_size"]: _mean_accuracy(row) for row in (*grouped, plain) if row.get("tasks")},
        "decode": {weights: statistics.median(speed[weights][folder] for folder in both) for weights in speed if both},
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


def _mean_accuracy(row: Values) -> list[float]:
    """Mean accuracy over the tasks of a row, and its standard error."""
    tasks = row["tasks"].values()
    spread = math.sqrt(sum(task["acc_stderr"] ** 2 for task in tasks)) / len(tasks)
    return [sum(task["acc"] for task in tasks) / len(tasks), spread]


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
        "sizes": Source(
            file="recovery-sizes.json",
            command="python benchmarks/recovery.py sizes --tokens 16384 --task-data DIR",
            by_hand=True,
        ),
        "cost": Source(file="recovery-cost.json", command="python benchmarks/recovery.py cost PRUNED", by_hand=True),
        "speed": SPEED,
    },
    limits="llama.cpp has one 4-bit type with a zero point, of 32 inputs: groups of 32 are written as they are, others "
    "are merged and rounded again there, so size and speed in llama.cpp are those of 32 for all of them.",
)
