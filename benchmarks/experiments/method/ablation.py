"""Ablation of our additions, one at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from harness.charts import bars
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.commands import VALIDATION
from lab.dense import Dense, Ratios, opened
from lab.measures import mean_and_spread
from lab.texts import TEXTS
from torch import nn

from saap.core.records import ImportanceScores, Layout, StructurePlan, UnitScores
from saap.estimation.estimate import estimate, unit_scores
from saap.models.walk.backend import Backend
from saap.settings.prune import PRESETS, FusionScope, Preset, PrunableRole
from saap.settings.registry import Importance, Strategy
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.evaluator import StructureEvaluator
from saap.structure_search.plan import SearchSpace, search
from saap.structure_search.problem import SearchGuide
from saap.structure_search.second_order import SecondOrder
from saap.surgery.cut import cut
from saap.surgery.reconstruct import ReconstructionSettings, reconstruct

RATIO = 0.2
MEASURED = ("wikitext2", "novel")
WITHOUT = {
    "everything": "nothing is taken away",
    "search": "the first candidate, unmeasured, in place of the best of those measured",
    "module-ratios": "the same share in every module that is not protected, unmeasured",
    "local-choice": "the plan's own units, by importance, in place of the second-order choice on the pruned stream",
    "residual-target": "the dense module's output alone as the target of the reconstruction",
    "restoration": "cut only",
}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Shared data of all variants of one seed."""

    dense: Dense
    scores: ImportanceScores
    units: Mapping[str, UnitScores]
    costs: SecondOrder
    evaluator: StructureEvaluator
    text: torch.Tensor


DEFAULTS = PRESETS[Preset.DEFAULT]
SETTINGS = {
    "model": "{model}", "calibration": VALIDATION, "seeds": Scaled([0], [0, 1, 2]),
    "pruning ratio": RATIO, "samples": Scaled(4, 50), "sample length": Scaled(32, 128),
    "candidates": Scaled(3, DEFAULTS.search_evaluations),
    "held-out samples": Scaled(2, DEFAULTS.held_sequences),
    "refit sequences": Scaled(4, 32), "refit length": Scaled(64, 512),
    "measured tokens": Scaled(512, 8192),
}  # fmt: skip


def cells(request: Request) -> Names:
    return [f"{name}-{seed}" for seed in request.settings["seeds"] for name in WITHOUT]


def measure(request: Request, wanted: Names) -> Measured:
    chosen = request.settings
    with opened(request.model) as dense:
        ratios = Ratios(dense, chosen["measured tokens"], {name: TEXTS[name] for name in MEASURED})
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
                removed = 1 - plans[kind].block_parameters / dense.graph.block_parameters
                yield f"{name}-{seed}", {"ratio": ratios.of(made(prepared, plans[kind], name)), "removed": removed}


def prepare(dense: Dense, chosen: Values, seed: int) -> Prepared:
    """Scores, costs, evaluator and reconstruction text, as in a run calibrated on a file."""
    length = chosen["sample length"]
    samples = dense.samples(
        VALIDATION, seed, scored=(chosen["samples"], length), held=(chosen["held-out samples"], length),
        refit=(chosen["refit sequences"], chosen["refit length"]),
    )  # fmt: skip
    scores, text = estimate(dense.backend, samples["scored"]), dense.ids(samples["refit"])
    costs = dense.second_order_costs(text, micro_batch=1)
    return Prepared(
        dense=dense, scores=scores, costs=costs, text=text,
        units=unit_scores(scores, dense.graph, Importance.FUSED, FusionScope.LAYER_ROLE),
        evaluator=StructureEvaluator(dense.backend, dense.ids(samples["held"]), costs.grams),
    )  # fmt: skip


def plan_without(prepared: Prepared, name: str, candidates: int, seed: int) -> StructurePlan:
    """The plan of the default search, without the search, or with equal ratios in all modules."""
    dense, measured = prepared.dense, name == "everything"
    space = SearchSpace(
        roles=(PrunableRole.FFN, PrunableRole.ATTENTION), layout=Layout.ADAPTIVE, align=dense.align
    )  # fmt: skip
    guide = SearchGuide(
        costs=None if name == "module-ratios" else prepared.costs,
        evaluator=prepared.evaluator if measured else None, evaluations=candidates if measured else 0, seed=seed,
    )  # fmt: skip
    return search(
        dense.graph, prepared.units, budget_for_ratio(dense.graph, RATIO), space, Strategy.ADAPTIVE, guide
    )  # fmt: skip


def made(prepared: Prepared, plan: StructurePlan, name: str) -> nn.Module:
    """The pruned model without the addition `name`."""
    dense, local = prepared.dense, name != "local-choice"
    model = copy.deepcopy(dense.model)
    if name != "restoration":
        elements = {group: scores.element for group, scores in prepared.scores.groups.items()}
        how = ReconstructionSettings(
            second_order=local, scores=elements if local else None, residual_target=name != "residual-target"
        )
        reconstruct(Backend(model, dense.graph), plan, prepared.text, how)
    cut(model, dense.graph, plan)
    return model


def summarise(cells: Cells) -> Values:
    found = {
        name: {
            text: mean_and_spread([one["ratio"][text] for cell, one in cells.items() if cell.startswith(f"{name}-")])
            for text in MEASURED
        }
        for name in WITHOUT
    }
    full = found["everything"]["wikitext2"][0]
    loss = {name: values["wikitext2"][0] / full for name, values in found.items() if name != "everything"}
    most, least = max(loss, key=lambda name: loss[name]), min(loss, key=lambda name: loss[name])
    return {
        "variants": found, "meaning": WITHOUT, "full": full, "factor": loss, "seeds": len(cells) // len(WITHOUT),
        "most": most, "most_factor": loss[most], "least": least, "least_factor": loss[least],
    }  # fmt: skip


def figures(summary: Values) -> Figures:
    names = list(summary["variants"])
    return [bars(
        "ablation", "What each addition is worth",
        "Perplexity of the pruned over that of the dense model, with one addition taken away at a time.",
        {text: [summary["variants"][name][text][0] for name in names] for text in MEASURED},
        [name if name == "everything" else f"without {name}" for name in names], x="perplexity / dense",
    )]  # fmt: skip
