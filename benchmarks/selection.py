"""Literal strategies and single importances on the real model, with and without restoration (effort `fast`).

    python benchmarks/selection.py            # writes benchmarks/results/selection.json and the table of README.md

20 % of the blocks' parameters, FFN channels only, both ends spared, calibrated on WikiText-2 validation. One estimation
per element order is shared by all rows. Perplexity: WikiText-2 test, windows of 512, first 8,192 tokens.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import torch
from readme_tables import write_between_marks

from saap.core.records import Layout, Role
from saap.data.placement import SampleRequest
from saap.data.samples import draw_sets, token_stream
from saap.data.texts import read_documents
from saap.discovery import discover
from saap.estimation.calibrate import estimate
from saap.estimation.selection import unit_scores
from saap.evaluation.perplexity import perplexity
from saap.models.loading.devices import quick_float32_products
from saap.models.structure.masking import masked
from saap.models.walk.backend import Backend
from saap.pipeline.shared.inputs import RunOptions, open_model
from saap.settings.prune import ElementOrder, FusionScope, Importance, PrunableRole, Strategy
from saap.structure_search.objectives import budget_for_ratio
from saap.structure_search.plan import SearchSpace, search
from saap.surgery.cut import cut
from saap.surgery.refit import RestoreSettings
from saap.surgery.restore import restore

HERE = Path(__file__).resolve().parent
WIKITEXT2 = HERE / "data" / "wikitext2"
ROWS = [
    (Strategy.UNIFORM, Importance.VECTOR),
    (Strategy.UNIFORM, Importance.ELEMENT1),
    (Strategy.UNIFORM, Importance.ELEMENT2),
    (Strategy.UNIFORM, Importance.MIXED),
    (Strategy.UNIFORM, Importance.FUSED),
    (Strategy.IMPORTANCE, Importance.FUSED),
    (Strategy.VOLATILITY_Z, Importance.FUSED),
    (Strategy.VOLATILITY_CV, Importance.FUSED),
]
ORDERS = {Importance.ELEMENT1: ElementOrder.FIRST, Importance.MIXED: ElementOrder.MIXED}


def main() -> None:
    loaded = open_model("smollm2", RunOptions())
    graph = discover(loaded.model, loaded.ref)
    requests = [SampleRequest("scored", 50, 128), SampleRequest("refit", 16, 512)]
    tokens = draw_sets(str(WIKITEXT2 / "validation.jsonl.gz"), loaded.tokenizer, requests, seed=0)
    test = token_stream(read_documents(WIKITEXT2 / "test.jsonl.gz"), loaded.tokenizer)[:8192]
    space = SearchSpace(roles=(PrunableRole.FFN,), layout=Layout.ADAPTIVE, align=32)
    results = []
    with quick_float32_products():
        dense = perplexity(loaded.model, test).value
        scores = {
            order: estimate(Backend(loaded.model, graph), tokens["scored"], roles=[Role.FFN], element_order=order)
            for order in ElementOrder
        }
        for strategy, importance in ROWS:
            order = ORDERS.get(importance, ElementOrder.SECOND)
            units = unit_scores(scores[order], graph, importance, FusionScope.LAYER_ROLE)
            plan = search(graph, units, budget_for_ratio(graph, 0.2), space, strategy)
            with masked(loaded.model, graph, plan):
                without = perplexity(loaded.model, test).value / dense
            start = time.perf_counter()
            model = copy.deepcopy(loaded.model)
            refit = torch.from_numpy(tokens["refit"].tokens)
            restore(Backend(model, graph), plan, refit, RestoreSettings(second_order=False))
            cut(model, graph, plan)
            seconds = time.perf_counter() - start
            row = {
                "strategy": str(strategy),
                "importance": str(importance),
                "ratio_without_restoration": without,
                "ratio_with_restoration": perplexity(model, test).value / dense,
                "restoration_seconds": round(seconds, 1),
                "pruning_ratio": 1 - plan.block_parameters / graph.block_parameters,
            }
            results.append(row)
            print(json.dumps(row), flush=True)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "selection.json").write_text(json.dumps({"dense": dense, "rows": results}, indent=1) + "\n")
    write_table(results)


def write_table(results: list[dict[str, object]]) -> None:
    lines = ["| strategy | importance | without restoration | with restoration |", "|---|---|---|---|"]
    for row in results:
        ratios = [f"{float(str(row[name])):.3g}" for name in ("ratio_without_restoration", "ratio_with_restoration")]
        lines.append(f"| {row['strategy']} | {row['importance']} | {ratios[0]} | {ratios[1]} |")
    write_between_marks("selection", "\n".join(lines))


if __name__ == "__main__":
    main()
