"""Speed against what is removed, in both layouts and several runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resultsbook.charts import lines
from resultsbook.row import Cells, Row, Source, Values
from saap.reporting.figures import Figure

PAPER_SPEEDUP = 1.05
"""The paper's gain in token generation, pruned over dense."""


def summarise(cells: Cells) -> dict[str, Any]:
    rows = cells["speed"]["rows"]
    near = [row for row in rows if abs(row["removed"] - 0.2) < 0.01]
    in_llama = [row for row in near if row["runtime"] == "llama.cpp" and row["weights"] == "f16"]
    in_transformers = [row for row in near if row["runtime"] == "transformers"]
    asked = cells["speed"]["asked"]
    return {
        "rows": rows,
        "paper_speedup": PAPER_SPEEDUP,
        "removed": min(row["removed"] for row in near),
        "llama_cpp": [min(r["decode_speedup"] for r in in_llama), max(r["decode_speedup"] for r in in_llama)],
        "transformers": [
            min(r["decode_speedup"] for r in in_transformers), max(r["decode_speedup"] for r in in_transformers),
        ],
        "asked": asked,
        "worst_of_asked": max(abs(row["reached"] / row["asked"] - 1) for row in asked),
        "threads": cells["speed"]["threads"],
        "rounds": cells["speed"]["rounds"],
    }  # fmt: skip


def figures(summary: Values) -> Sequence[Figure]:
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in sorted(summary["rows"], key=lambda row: float(row["removed"])):
        label = f"{row['runtime']} {row['weights']}, {row['layout']}"
        places, values = series.setdefault(label, ([], []))
        places.append(100 * row["removed"])
        values.append(row["decode_speedup"])
    figure = lines(
        "speed", "Decoding against what is removed",
        "Speed-up of decoding one token at a time against the share of the blocks that is removed.",
        series, x="% of the decoder blocks removed", y="decode, pruned / dense",
    )  # fmt: skip
    return (figure,)


SPEED = Source(
    file="speed.json",
    command="python benchmarks/speed.py adaptive/0.2 adaptive/0.4 uniform/0.2 uniform/0.4 asked/llama.cpp "
    "asked/transformers",
    by_hand=True,
)

ROW = Row(
    name="speed",
    title="Speed",
    question="How much faster is a pruned model, in both layouts and several runtimes, next to the paper's +5 %?",
    summarise=summarise,
    figures=figures,
    sources={"speed": SPEED},
    limits="A small model on two CPUs: transformers and what was asked for with `--target-speedup` were measured on "
    "one with a large cache, the types of llama.cpp later on one with a small cache. The paper had another model and "
    "machine.",
)
