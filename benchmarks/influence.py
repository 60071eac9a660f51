"""Which six blocks have the least influence (ShortGPT), and what removing them costs, by the samples of the draw.

    python benchmarks/influence.py              # some ten minutes; writes results/influence.json and its table

Samples of WikiText-2 validation; perplexity ratio on the first 16,384 tokens of WikiText-2 test, windows of 512. Beside
the six of each draw, the sixth is exchanged for the seventh, since the two may be as good as equal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from readme_tables import write_between_marks
from resultsbook.models import VALIDATION, Dense, draw, masked_perplexity, measured_text, open_dense

from saap.baselines.activations import activation_statistics
from saap.core.records import IntArray, Layout
from saap.data.placement import SampleRequest
from saap.evaluation.perplexity import perplexity
from saap.models.loading.devices import quick_float32_products
from saap.models.walk.backend import Backend
from saap.settings.prune import Method
from saap.structure_search.plan import make_plan

RESULT = Path(__file__).resolve().parent / "results" / "influence.json"
REMOVED = 6
DRAWS = ((64, 128, 0), (64, 128, 1), (64, 128, 2), (16, 512, 0))
"""Samples, tokens of a sample, seed."""


def without(dense: Dense, blocks: Sequence[int], text: IntArray) -> float:
    """Perplexity of the model without these blocks."""
    plan = make_plan(dense.graph, {}, blocks, layout=Layout.ADAPTIVE, strategy=Method.BLOCK_INFLUENCE, align=1)
    return masked_perplexity(dense, plan, text)


def measure() -> dict[str, Any]:
    dense = open_dense("smollm2")
    text = measured_text(dense, "wikitext2", 16384)
    ratios: dict[str, float] = {}
    draws = []
    with quick_float32_products():
        whole = perplexity(dense.model, text, leading=dense.leading).value
        for samples, length, seed in DRAWS:
            drawn = draw(dense, VALIDATION, [SampleRequest("scored", samples, length)], seed)["scored"]
            influence = activation_statistics(
                Backend(dense.model, dense.graph), torch.from_numpy(drawn.tokens)
            ).influence
            order = [int(block) for block in np.argsort(influence)]
            sets = [sorted(order[:REMOVED]), sorted([*order[: REMOVED - 1], order[REMOVED]])]
            for blocks in sets:
                if str(blocks) not in ratios:
                    ratios[str(blocks)] = without(dense, blocks, text) / whole
            borders = [float(influence[order[place]]) for place in (REMOVED - 1, REMOVED)]
            draws.append({"samples": samples, "length": length, "seed": seed, "sets": sets, "borders": borders})
            print(json.dumps(draws[-1]), flush=True)
    return {"draws": draws, "ratios": ratios}


def table(result: dict[str, Any]) -> str:
    lines = [
        "| samples | six blocks | ratio | influence of sixth, seventh | with the seventh instead | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for one in result["draws"]:
        first, second = one["sets"]
        cells = [f"{', '.join(map(str, blocks))} | {result['ratios'][str(blocks)]:.3f}" for blocks in (first, second)]
        borders = ", ".join(f"{value:.4f}" for value in one["borders"])
        lines.append(
            f"| {one['samples']} x {one['length']}, seed {one['seed']} | {cells[0]} | {borders} | {cells[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    result = measure()
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    write_between_marks("influence", table(result))


if __name__ == "__main__":
    main()
