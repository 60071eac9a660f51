"""Our default versus the baselines on another real model than SmolLM2."""

from typing import Any

from harness.digests import PRUNING
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
DECIDED_BY = (*PRUNING, "baselines", "pipeline/compare")


def measure(request: Request, wanted: Names) -> Measured:
    flags = flags_from(request.settings)
    flags += [word for file in TEXTS.values() for word in ("--perplexity", file)]
    out = request.work / f"compare-{GEMMA}"
    whole = compared(multilingual_model(request), {"yes": ["saap"], "both": BASELINES}, *flags, out=out)
    rows = []
    for row in whole["rows"]:
        ratios = {name: row["ratios"][file] for name, file in TEXTS.items()}
        rows.append({"method": row["method"], "restored": row["restored"], "ratios": ratios})
    dense = {name: whole["dense"]["perplexity"][file]["value"] for name, file in TEXTS.items()}
    yield GEMMA, {"dense": dense, "rows": rows}


def summarise(cells: Cells) -> Values:
    rows: list[dict[str, Any]] = []
    for model, cell in cells.items():
        for text, dense in cell["dense"].items():
            ratios = {(row["method"], row["restored"]): row["ratios"][text] for row in cell["rows"]}
            best = {}
            for restored in (False, True):
                method = min(BASELINES, key=lambda method: ratios[method, restored])
                best["restored" if restored else "published"] = {"method": method, "ratio": ratios[method, restored]}
            rows.append({"model": model, "text": text, "dense": dense, "ours": ratios["saap", True], **best})
    return {"rows": rows, "most": max(row["ours"] / row["restored"]["ratio"] for row in rows)}
