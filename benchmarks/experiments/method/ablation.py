"""Ablation: what each part of the search and the reconstruction is worth, taken away one at a time."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from harness.charts import bars
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.dense import Dense, Ratios, opened, source_of
from lab.measures import geometric_mean
from lab.texts import TEXTS
from torch import nn

from experiments.quality.models import GEMMA, SMOLLM2
from saap.core.records import Layout, StructurePlan
from saap.data.samples import leading_ids
from saap.models.loading.devices import quick_products
from saap.models.walk.backend import Backend
from saap.settings.presets import PRESETS, Preset
from saap.settings.prune import PrunableRole, SkipLayers
from saap.settings.registry import Strategy
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.evaluator import StructureEvaluator
from saap.structure_search.plan import SearchSpace, search
from saap.structure_search.problem import SearchGuide
from saap.surgery.cut import cut
from saap.surgery.distillation import DistillationText, distill
from saap.surgery.held_out import MICRO_BATCH, divided
from saap.surgery.reconstruct import ReconstructionSettings, reconstruct

MODELS = (SMOLLM2, GEMMA)
ROLES = (PrunableRole.FFN, PrunableRole.ATTENTION)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is done, in words and settings.

    search: whether candidates are measured. protected: whether both ends are. importance: whether it weighs in the
    choice of units. how: the least squares, None for none. distilled: share of the tokens for the distillation.
    """

    meaning: str
    search: bool = False
    protected: bool = True
    importance: bool = True
    how: ReconstructionSettings | None = field(default_factory=ReconstructionSettings)
    distilled: float = 0.5


EVERYTHING = "everything"
VARIANTS: Mapping[str, Variant] = {
    EVERYTHING: Variant(
        meaning="the preset `fast` without its search: half of the tokens for least squares, half for the distillation"
    ),
    "least squares alone": Variant(meaning="no distillation, all tokens for least squares", distilled=0.0),
    "own units": Variant(
        meaning="the plan's units by importance, not those chosen on the pruned stream",
        how=ReconstructionSettings(second_order=False),
    ),
    "no importance": Variant(meaning="units chosen on the pruned stream by second-order cost alone", importance=False),
    "module target": Variant(
        meaning="least squares towards the dense module's output, not the dense residual stream",
        how=ReconstructionSettings(residual_target=False),
    ),
    "ends too": Variant(meaning="the layers at both ends lose as much as the others", protected=False),
    "search": Variant(meaning="with the search of the preset `default` on top", search=True),
    "cut only": Variant(meaning="neither least squares nor distillation", how=None, distilled=0.0),
}
CELLS = [f"{model}/{name}" for model in MODELS for name in VARIANTS]
FAST, SEARCHED = PRESETS[Preset.FAST], PRESETS[Preset.DEFAULT]
SETTINGS = {
    "calibration": "mixed", "seed": 0, "pruning ratio": 0.2, "samples": Scaled(4, 50),
    "sample length": Scaled(32, FAST.sample_length), "candidates": Scaled(3, SEARCHED.search_evaluations),
    "held-out samples": Scaled(2, SEARCHED.held_sequences), "refit sequences": Scaled(8, FAST.refit_sequences),
    "refit length": Scaled(64, FAST.refit_length), "measured tokens": Scaled(512, 8192),
}  # fmt: skip
SMOKE = False
PARTIAL = True


def measure(request: Request, wanted: Names) -> Measured:
    for source in dict.fromkeys(cell.partition("/")[0] for cell in wanted):
        with opened(source_of(request, source)) as dense:
            pruning = Pruning(dense, request.settings)
            for cell in wanted:
                model, _, name = cell.partition("/")
                if model == source:
                    yield cell, pruning.measured(VARIANTS[name])


class Pruning:
    """A dense model with its scores, texts and perplexities, to be pruned in several ways."""

    def __init__(self, dense: Dense, chosen: Values) -> None:
        self._dense, self._chosen = dense, chosen
        length = chosen["sample length"]
        samples = dense.samples(
            chosen["calibration"], chosen["seed"], scored=(chosen["samples"], length),
            held=(chosen["held-out samples"], length), refit=(chosen["refit sequences"], chosen["refit length"]),
        )  # fmt: skip
        self._scores = dense.token_fisher(samples["scored"])
        self._text = dense.ids(samples["refit"])
        self._evaluator = StructureEvaluator(dense.backend, dense.ids(samples["held"]))
        self._ratios = Ratios(dense, chosen["measured tokens"], TEXTS)

    def measured(self, variant: Variant) -> Values:
        plan = self._plan(variant)
        model = self._dense.pruned(plan) if variant.how is None else self._restored(plan, variant, variant.how)
        return {
            "ratio": self._ratios.of(model),
            "removed": 1 - plan.block_parameters / self._dense.graph.block_parameters,
        }

    def _plan(self, variant: Variant) -> StructurePlan:
        graph = self._dense.graph
        ends = None if variant.protected else SkipLayers()
        space = SearchSpace(roles=ROLES, layout=Layout.ADAPTIVE, align=self._dense.align, skip_layers=ends)
        guide = SearchGuide()
        if variant.search:
            guide = SearchGuide(evaluator=self._evaluator, evaluations=self._chosen["candidates"])
        budget = budget_for_ratio(graph, self._chosen["pruning ratio"])
        return search(graph, self._scores, budget, space, Strategy.ADAPTIVE, guide)

    def _restored(self, plan: StructurePlan, variant: Variant, how: ReconstructionSettings) -> nn.Module:
        """As `saap prune` does it."""
        means = {group: score.mean for group, score in self._scores.items()}
        how = dataclasses.replace(how, scores=means if variant.importance else None)
        leading, graph = leading_ids(self._dense.loaded.tokenizer), self._dense.graph
        fitted, others, held_out = divided(self._text, self._chosen["seed"], leading, share=variant.distilled)
        backend = Backend(copy.deepcopy(self._dense.model), graph, products=quick_products(self._text.device))
        done = reconstruct(backend, plan, fitted, how, others)
        cut(backend.model, graph, plan)
        text = DistillationText(tokens=others, teacher=done.dense, held_out=held_out, micro_batch=MICRO_BATCH)
        distill(backend, graph.blocks, text)
        return backend.model


def summarise(cells: Cells) -> Values:
    tables: list[dict[str, Any]] = []
    for model in MODELS:
        rows = {name: cells[f"{model}/{name}"]["ratio"] for name in VARIANTS if f"{model}/{name}" in cells}
        if EVERYTHING in rows:
            means = {name: geometric_mean(list(ratios.values())) for name, ratios in rows.items()}
            tables.append({
                "model": model, "rows": rows, "means": means,
                "factors": {name: mean / means[EVERYTHING] for name, mean in means.items() if name != EVERYTHING},
            })  # fmt: skip
    meanings = {name: one.meaning for name, one in VARIANTS.items()}
    found: dict[str, Any] = {"tables": tables, "meanings": meanings, "texts": list(TEXTS)}
    if tables:
        factors: dict[str, float] = tables[0]["factors"]
        restored = {name: factor for name, factor in factors.items() if VARIANTS[name].how is not None}
        most, most_of_parts = (max(one.items(), key=itemgetter(1))[0] for one in (factors, restored))
        found |= {"most": most, "most_of_parts": most_of_parts}
    return found


def figures(summary: Values) -> Figures:
    tables = {table["model"]: table["means"] for table in summary["tables"]}
    names = [name for name in VARIANTS if all(name in means for means in tables.values())]
    values = {model: [means[name] for name in names] for model, means in tables.items()}
    return [bars("ablation", values, names, x="perplexity / dense")]
