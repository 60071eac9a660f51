"""Our default against the baselines on another real model than SmolLM2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import TEST, VALIDATION, compared
from lab.dense import multilingual_model

TEXTS = {"wikitext2": TEST, "french": "benchmarks/data/flores200/fra.evaluation.txt.gz"}
BASELINES = ("llm-pruner-element2@ffn", "flap", "wanda-sp@ffn")
GEMMA = "gemma-3-270m"


def settings(request: Request) -> Values:
    return {
        "calibration": VALIDATION, "samples": 24, "sample length": 128, "refit tokens": 8192, "effort": "default",
        "pruning ratio": 0.2, "measured tokens": 2048, "window": 512,
    }  # fmt: skip


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    chosen = settings(request)
    flags = [
        "--pruning-ratios", chosen["pruning ratio"], "--calibration", VALIDATION, "--samples", chosen["samples"],
        "--sample-length", chosen["sample length"], "--refit-tokens", chosen["refit tokens"],
        "--effort", chosen["effort"], "--window", chosen["window"], "--max-tokens", chosen["measured tokens"],
    ]  # fmt: skip
    for file in TEXTS.values():
        flags += ["--perplexity", file]
    out = request.work / f"compare-{GEMMA}"
    whole = compared(multilingual_model(request), {"yes": ["saap"], "both": BASELINES}, *flags, out=out)
    yield GEMMA, {
        "dense": {name: whole["dense"]["perplexity"][file]["value"] for name, file in TEXTS.items()},
        "rows": [
            {
                "method": row["method"], "restored": row["restored"],
                "ratios": {name: row["ratios"][file] for name, file in TEXTS.items()},
            }
            for row in whole["rows"]
        ],
    }  # fmt: skip


def summarise(cells: Cells) -> dict[str, Any]:
    rows = [
        {
            "model": model, "text": text, "dense": dense,
            "ours": next(row["ratios"][text] for row in cell["rows"] if row["method"] == "saap"),
            "published": best(cell["rows"], text, restored=False),
            "restored": best(cell["rows"], text, restored=True),
        }
        for model, cell in cells.items()
        for text, dense in cell["dense"].items()
    ]  # fmt: skip
    return {"rows": rows, "most": max(row["ours"] / row["restored"]["ratio"] for row in rows)}


def best(rows: Sequence[Values], text: str, *, restored: bool) -> dict[str, Any]:
    """The best baseline on a text."""
    theirs = [row for row in rows if row["method"] != "saap" and row["restored"] is restored]
    row = min(theirs, key=lambda row: float(row["ratios"][text]))
    return {"method": row["method"], "ratio": row["ratios"][text]}


EXPERIMENT = Experiment(
    name="other-models", cells=lambda request: [GEMMA], settings=settings, measure=measure, summarise=summarise,
    smoke=False,
)  # fmt: skip
