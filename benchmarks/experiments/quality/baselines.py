"""The baselines compared with what the methods' published code gives on the same model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import TEST, VALIDATION, compared

TOLERANCE = 0.05
PUBLISHED = {
    "llm-pruner-element2@ffn": 1.57,
    "llm-pruner-element1@ffn": 1.63,
    "llm-pruner-vector@ffn": 2.19,
    "flap": 1.68,
    "wanda-sp": 1.69,
    "block-influence": 2.94,
}
"""Ratios of the methods' own code, run by hand with the same protocol; inputs of this experiment, not its output."""


def settings(request: Request) -> Values:
    return {
        "model": request.model, "calibration": VALIDATION, "samples": 64, "sample length": 128, "pruning ratio": 0.2,
        "measured on": TEST, "measured tokens": 16384, "window": 512, "seeds": [0],
    }  # fmt: skip


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    chosen = settings(request)
    whole = compared(
        request.model, {"no": wanted}, "--pruning-ratios", chosen["pruning ratio"],
        "--seeds", ",".join(map(str, chosen["seeds"])), "--calibration", VALIDATION, "--samples", chosen["samples"],
        "--sample-length", chosen["sample length"], "--perplexity", TEST, "--window", chosen["window"],
        "--max-tokens", chosen["measured tokens"],
    )  # fmt: skip
    for method in wanted:
        rows = [row for row in whole["rows"] if row["method"] == method]
        yield (
            method,
            {"ratios": [row["ratios"][TEST] for row in rows], "removed": [row["pruning_ratio"] for row in rows]},
        )


def summarise(cells: Cells) -> dict[str, Any]:
    methods = {
        method: {
            "published": expected,
            "ratios": cells[method]["ratios"],
            "quotient": sum(cells[method]["ratios"]) / len(cells[method]["ratios"]) / expected,
        }
        for method, expected in PUBLISHED.items()
    }
    near = sum(abs(one["quotient"] - 1) <= TOLERANCE for one in methods.values())
    return {"methods": methods, "tolerance": TOLERANCE, "near": near, "count": len(methods)}


EXPERIMENT = Experiment(
    name="baselines", cells=lambda request: list(PUBLISHED), settings=settings, measure=measure, summarise=summarise,
    smoke=False,
)  # fmt: skip
