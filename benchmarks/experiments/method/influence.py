"""Which six blocks have the least influence (ShortGPT), and what removing them costs, by the samples of the draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import VALIDATION
from lab.dense import Dense, draw, masked_perplexity, measured_text, on_device, open_dense

from saap.baselines.activations import activations
from saap.core.records import IntArray, Layout
from saap.data.placement import SampleRequest
from saap.models.loading.devices import quick_float32_products
from saap.models.walk.backend import Backend
from saap.settings.registry import Method
from saap.structure_search.plan import make_plan

DRAWS = {
    f"{samples} x {length}, seed {seed}": (samples, length, seed)
    for samples, length, seed in ((64, 128, 0), (64, 128, 1), (64, 128, 2), (16, 512, 0))
}
"""Samples, tokens of a sample, seed."""


def settings(request: Request) -> Values:
    return {
        "model": request.model, "calibration": VALIDATION, "removed": 1 if request.quick else 6,
        "measured tokens": 512 if request.quick else 16384,
    }  # fmt: skip


def without(dense: Dense, blocks: Sequence[int], text: IntArray) -> float:
    """Perplexity of the model without these blocks."""
    plan = make_plan(dense.graph, {}, blocks, layout=Layout.ADAPTIVE, strategy=Method.BLOCK_INFLUENCE, align=1)
    return masked_perplexity(dense, plan, text)


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    """The blocks of each draw, and those with the next one in place of the last, since both may be as good as equal."""
    chosen, dense = settings(request), open_dense(request.model)
    text, removed = measured_text(dense, "wikitext2", chosen["measured tokens"]), chosen["removed"]
    ratios: dict[str, float] = {}
    with quick_float32_products():
        whole = dense.perplexity(text)
        for cell in wanted:
            samples, length, seed = DRAWS[cell]
            drawn = draw(dense, VALIDATION, [SampleRequest("scored", samples, length)], seed)["scored"]
            influence = activations(Backend(dense.model, dense.graph), on_device(drawn, dense.model)).influence
            order = [int(block) for block in np.argsort(influence)]
            sets = [sorted(order[:removed]), sorted([*order[: removed - 1], order[removed]])]
            for blocks in sets:
                if str(blocks) not in ratios:
                    ratios[str(blocks)] = without(dense, blocks, text) / whole
            borders = [float(influence[order[place]]) for place in (removed - 1, removed)]
            yield cell, {"sets": sets, "borders": borders, "ratios": [ratios[str(blocks)] for blocks in sets]}


def summarise(cells: Cells) -> dict[str, Any]:
    ratios = {
        str(blocks): ratio
        for cell in cells.values()
        for blocks, ratio in zip(cell["sets"], cell["ratios"], strict=True)
    }
    firsts = [str(cell["sets"][0]) for cell in cells.values()]
    return {
        "draws": dict(cells), "ratios": [min(ratios.values()), max(ratios.values())], "count": len(cells),
        "different": len(set(firsts)),
    }  # fmt: skip


EXPERIMENT = Experiment(
    name="influence", cells=lambda request: list(DRAWS), settings=settings, measure=measure, summarise=summarise
)
