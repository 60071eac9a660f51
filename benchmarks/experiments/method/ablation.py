"""Our own additions, each taken away alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness.charts import bars
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import VALIDATION
from lab.dense import Dense, draw, measured_text, on_device, open_dense
from lab.measures import mean_and_spread
from torch import nn

from saap.core.records import ImportanceScores, Layout, StructurePlan, UnitScores
from saap.data.placement import SampleRequest
from saap.estimation.estimate import estimate, unit_scores
from saap.models.loading.devices import quick_float32_products
from saap.models.walk.backend import Backend
from saap.reporting.figures import Figure
from saap.settings.prune import EFFORTS, Effort, FusionScope, PrunableRole
from saap.settings.registry import Importance, Strategy
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.costs import SecondOrder, second_order_costs
from saap.structure_search.evaluator import StructureEvaluator
from saap.structure_search.plan import SearchSpace, search
from saap.structure_search.problem import SearchGuide
from saap.surgery.cut import cut
from saap.surgery.reconstruct import ReconstructionSettings, reconstruct

RATIO = 0.2
TEXTS = ("wikitext2", "novel")
WITHOUT = {
    "everything": "nothing is taken away",
    "search": "the first candidate, unmeasured, in place of the best of those measured",
    "module-ratios": "the same share in every module that is not spared, unmeasured",
    "local-choice": "the plan's own units, by importance, in place of the second-order choice on the pruned stream",
    "residual-target": "the dense module's output alone as the target of the restoration",
    "restoration": "cut only",
}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What all variants of one seed share."""

    dense: Dense
    scores: ImportanceScores
    units: Mapping[str, UnitScores]
    element: Mapping[str, UnitScores]
    costs: SecondOrder
    evaluator: StructureEvaluator
    refit: torch.Tensor


def settings(request: Request) -> Values:
    quick = request.quick
    effort = EFFORTS[Effort.DEFAULT]
    return {
        "model": request.model, "calibration": VALIDATION, "seeds": [0] if quick else [0, 1, 2], "pruning ratio": RATIO,
        "samples": 4 if quick else 50, "sample length": 32 if quick else 128,
        "candidates": 3 if quick else effort.search_evaluations,
        "held-out samples": 2 if quick else effort.held_sequences,
        "refit sequences": 4 if quick else 32, "refit length": 64 if quick else 512,
        "measured tokens": 512 if quick else 8192,
    }  # fmt: skip


def cells(request: Request) -> Sequence[str]:
    return [f"{name}-{seed}" for seed in settings(request)["seeds"] for name in WITHOUT]


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    chosen = settings(request)
    dense = open_dense(request.model)
    with quick_float32_products():
        texts = {name: measured_text(dense, name, chosen["measured tokens"]) for name in TEXTS}
        whole = {name: dense.perplexity(text) for name, text in texts.items()}
        for seed in chosen["seeds"]:
            names = [name for name in WITHOUT if f"{name}-{seed}" in wanted]
            if not names:
                continue
            prepared = prepare(dense, chosen, seed)
            plans: dict[str, StructurePlan] = {}
            for name in names:
                kind = name if name in ("search", "module-ratios") else "everything"
                if kind not in plans:
                    plans[kind] = plan_without(prepared, kind, chosen["candidates"], seed)
                model = made(prepared, plans[kind], name)
                ratios = {label: dense.perplexity(text, model) / whole[label] for label, text in texts.items()}
                yield f"{name}-{seed}", {"ratio": ratios, "removed": removed_share(dense, plans[kind])}


def prepare(dense: Dense, chosen: Values, seed: int) -> Prepared:
    """Scores, costs, judge and refit text, as a run calibrated on text of the user's own has them."""
    length = chosen["sample length"]
    requests = [
        SampleRequest("scored", chosen["samples"], length),
        SampleRequest("held", chosen["held-out samples"], length, held_out=True),
        SampleRequest("refit", chosen["refit sequences"], chosen["refit length"]),
    ]
    samples = draw(dense, VALIDATION, requests, seed)
    drawn = {name: on_device(found, dense.model) for name, found in samples.items()}
    scores = estimate(Backend(dense.model, dense.graph), samples["scored"])
    costs = second_order_costs(Backend(dense.model, dense.graph), drawn["refit"], micro_batch=1)
    return Prepared(
        dense=dense,
        scores=scores,
        units=unit_scores(scores, dense.graph, Importance.FUSED, FusionScope.LAYER_ROLE),
        element=unit_scores(scores, dense.graph, Importance.ELEMENT2, FusionScope.LAYER_ROLE),
        costs=costs,
        evaluator=StructureEvaluator(Backend(dense.model, dense.graph), drawn["held"], costs.grams),
        refit=drawn["refit"],
    )


def plan_without(prepared: Prepared, name: str, candidates: int, seed: int) -> StructurePlan:
    """The plan of the default search, or of it without the search, or without the modules' own ratios."""
    graph = prepared.dense.graph
    space = SearchSpace(
        roles=(PrunableRole.FFN, PrunableRole.ATTENTION), layout=Layout.ADAPTIVE, align=prepared.dense.align
    )
    measured = name == "everything"
    return search(
        graph,
        prepared.units,
        budget_for_ratio(graph, RATIO),
        space,
        Strategy.ADAPTIVE,
        SearchGuide(
            element_scores=prepared.element,
            costs=None if name == "module-ratios" else prepared.costs,
            evaluator=prepared.evaluator if measured else None,
            evaluations=candidates if measured else 0,
            seed=seed,
        ),
    )


def made(prepared: Prepared, plan: StructurePlan, name: str) -> nn.Module:
    """The pruned model, with what `name` says left out."""
    model = copy.deepcopy(prepared.dense.model)
    if name != "restoration":
        elements = {group: scores.element for group, scores in prepared.scores.groups.items()}
        how = ReconstructionSettings(
            second_order=name != "local-choice",
            scores=None if name == "local-choice" else elements,
            residual_target=name != "residual-target",
        )
        reconstruct(Backend(model, prepared.dense.graph), plan, prepared.refit, how)
    cut(model, prepared.dense.graph, plan)
    return model


def removed_share(dense: Dense, plan: StructurePlan) -> float:
    """Share of the blocks' parameters that leaves."""
    return 1 - plan.block_parameters / dense.graph.block_parameters


def summarise(cells: Cells) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in WITHOUT:
        same = [cell for label, cell in cells.items() if label.rpartition("-")[0] == name]
        found[name] = {text: mean_and_spread([cell["ratio"][text] for cell in same]) for text in TEXTS}
    full = found["everything"]["wikitext2"][0]
    loss = {name: values["wikitext2"][0] / full for name, values in found.items() if name != "everything"}
    most, least = max(loss, key=lambda name: loss[name]), min(loss, key=lambda name: loss[name])
    return {
        "variants": found, "meaning": WITHOUT, "full": full, "factor": loss, "seeds": len(cells) // len(WITHOUT),
        "most": most, "most_factor": loss[most], "least": least, "least_factor": loss[least],
    }  # fmt: skip


def figures(summary: Values) -> Sequence[Figure]:
    names = list(summary["variants"])
    values = {text: [summary["variants"][name][text][0] for name in names] for text in TEXTS}
    figure = bars(
        "ablation", "What each addition is worth",
        "Perplexity of the pruned over that of the dense model, with one addition taken away at a time.",
        values, [name if name == "everything" else f"without {name}" for name in names], x="perplexity / dense",
    )  # fmt: skip
    return (figure,)


EXPERIMENT = Experiment(
    name="ablation", cells=cells, settings=settings, measure=measure, summarise=summarise, figures=figures
)
