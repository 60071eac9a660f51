"""Our default versus the baselines on another real model than SmolLM2."""

from __future__ import annotations

from harness.experiment import Cells, Measured, Names, Request, Values
from lab.commands import TEST, VALIDATION, compared, flags_from
from lab.dense import multilingual_model

TEXTS = {"wikitext2": TEST, "french": "benchmarks/data/flores200/fra.evaluation.txt.gz"}
BASELINES = ("llm-pruner-element2@ffn", "flap", "wanda-sp@ffn")
GEMMA = "gemma-3-270m"
CELLS = [GEMMA]
SMOKE = False
SETTINGS = {
    "calibration": VALIDATION, "samples": 24, "sample length": 128, "refit tokens": 8192, "effort": "default",
    "pruning ratio": 0.2, "measured tokens": 2048, "window": 512,
}  # fmt: skip


def measure(request: Request, wanted: Names) -> Measured:
    flags = flags_from(request.settings)
    flags += [word for file in TEXTS.values() for word in ("--perplexity", file)]
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


def summarise(cells: Cells) -> Values:
    rows = []
    for model, cell in cells.items():
        for text, dense in cell["dense"].items():
            ratios = {(row["method"], row["restored"]): row["ratios"][text] for row in cell["rows"]}
            best = {}
            for restored in (False, True):
                method = min(BASELINES, key=lambda method: ratios[method, restored])
                best[restored] = {"method": method, "ratio": ratios[method, restored]}
            rows.append({
                "model": model, "text": text, "dense": dense, "ours": ratios["saap", True],
                "published": best[False], "restored": best[True],
            })  # fmt: skip
    return {"rows": rows, "most": max(row["ours"] / row["restored"]["ratio"] for row in rows)}
