"""The six blocks of lowest influence (ShortGPT), and the cost of removing them, by calibration samples."""

from typing import Any

import numpy as np
from harness.experiment import Cells, Measured, Names, Request, Scaled, Values
from lab.commands import VALIDATION
from lab.dense import opened, wikitext2

from saap.baselines.activations import activations
from saap.core.records import Layout
from saap.settings.registry import Method
from saap.structure_search.plan import make_plan

DRAWS = {"{} x {}, seed {}".format(*draw): draw for draw in ((64, 128, 0), (64, 128, 1), (64, 128, 2), (16, 512, 0))}
"""Samples, tokens per sample, seed."""
CELLS = list(DRAWS)
SETTINGS = {
    "model": "{model}", "calibration": VALIDATION, "removed": Scaled(1, 6), "measured tokens": Scaled(512, 16384),
}  # fmt: skip


def measure(request: Request, wanted: Names) -> Measured:
    """The blocks of each draw, and a variant with the next block in place of the last, since the two may be tied."""
    removed = request.settings["removed"]
    how: dict[str, Any] = {"layout": Layout.ADAPTIVE, "strategy": Method.BLOCK_INFLUENCE, "align": 1}
    with opened(request.model) as dense:
        ratios = wikitext2(dense, request.settings["measured tokens"])
        for cell in wanted:
            samples, length, seed = DRAWS[cell]
            drawn = dense.samples(VALIDATION, seed, scored=(samples, length))["scored"]
            influence = activations(dense.backend, dense.ids(drawn)).influence
            order = [int(block) for block in np.argsort(influence)]
            sets = [sorted(order[:removed]), sorted([*order[: removed - 1], order[removed]])]
            plans = [make_plan(dense.graph, {}, blocks, **how) for blocks in sets]
            borders = [float(influence[order[place]]) for place in (removed - 1, removed)]
            yield cell, {"sets": sets, "borders": borders, "ratios": [ratios.masked(p)["wikitext2"] for p in plans]}


def summarise(cells: Cells) -> Values:
    ratios = [ratio for cell in cells.values() for ratio in cell["ratios"]]
    return {
        "draws": cells, "ratios": [min(ratios), max(ratios)], "count": len(cells),
        "different": len({str(cell["sets"][0]) for cell in cells.values()}),
    }  # fmt: skip
