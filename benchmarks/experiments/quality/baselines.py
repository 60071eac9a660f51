"""The baselines compared with the methods' published code on the same model."""

from harness.digests import PRUNING
from harness.experiment import Cells, Measured, Names, Request, Values
from lab.commands import TEST, VALIDATION, compared, flags_from

TOLERANCE = 0.05
PUBLISHED = {
    "llm-pruner-element2@ffn": 1.57,
    "llm-pruner-element1@ffn": 1.63,
    "llm-pruner-vector@ffn": 2.19,
    "flap": 1.68,
    "wanda-sp": 1.69,
    "block-influence": 2.94,
}
"""Ratios of the published code, run by hand with the same protocol; inputs of this experiment."""
CELLS = list(PUBLISHED)
SMOKE = False
SETTINGS = {
    "model": "{model}", "calibration": VALIDATION, "samples": 64, "sample length": 128, "pruning ratio": 0.2,
    "measured on": TEST, "measured tokens": 16384, "window": 512, "seeds": [0],
}  # fmt: skip
DECIDED_BY = (*PRUNING, "baselines")


def measure(request: Request, wanted: Names) -> Measured:
    rows = compared(request.model, {"no": wanted}, "--seeds", "0", *flags_from(request.settings))["rows"]
    for row in rows:
        yield row["method"], {"ratios": [row["ratios"][TEST]], "removed": [row["pruning_ratio"]]}


def summarise(cells: Cells) -> Values:
    methods = {}
    for method, published in PUBLISHED.items():
        ratios = cells[method]["ratios"]
        quotient = sum(ratios) / len(ratios) / published
        methods[method] = {"published": published, "ratios": ratios, "quotient": quotient}
    near = sum(abs(one["quotient"] - 1) <= TOLERANCE for one in methods.values())
    return {"methods": methods, "tolerance": TOLERANCE, "near": near, "count": len(methods)}
