"""Ablation of our additions, one at a time."""

from functools import cache

from harness.charts import bars
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.commands import VALIDATION
from lab.dense import Dense, Ratios, opened
from lab.measures import mean_and_spread
from lab.texts import TEXTS
from torch import nn

from saap.core.records import Layout, StructurePlan
from saap.settings.presets import PRESETS, Preset
from saap.settings.prune import PrunableRole
from saap.settings.registry import Strategy
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.evaluator import StructureEvaluator
from saap.structure_search.plan import SearchSpace, search
from saap.structure_search.problem import SearchGuide
from saap.surgery.reconstruct import ReconstructionSettings

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
DEFAULTS = PRESETS[Preset.DEFAULT]
SETTINGS = {
    "model": "{model}", "calibration": VALIDATION, "seeds": Scaled([0], [0, 1, 2]),
    "pruning ratio": RATIO, "samples": Scaled(4, 50), "sample length": Scaled(32, 128),
    "candidates": Scaled(3, DEFAULTS.search_evaluations), "held-out samples": Scaled(2, DEFAULTS.held_sequences),
    "refit sequences": Scaled(4, 32), "refit length": Scaled(64, 512), "measured tokens": Scaled(512, 8192),
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
            prepared = Prepared(dense, chosen, seed)
            plan_without = cache(prepared.plan)
            for name in names:
                plan = plan_without(name if name in ("search", "module-ratios") else "everything")
                removed = 1 - plan.block_parameters / dense.graph.block_parameters
                yield f"{name}-{seed}", {"ratio": ratios.of(prepared.model(plan, name)), "removed": removed}


class Prepared:
    """Scores, evaluator and reconstruction text of one seed, as in a run calibrated on a file."""

    def __init__(self, dense: Dense, chosen: Values, seed: int) -> None:
        self._dense, self._candidates, self._seed = dense, chosen["candidates"], seed
        length = chosen["sample length"]
        samples = dense.samples(
            VALIDATION, seed, scored=(chosen["samples"], length), held=(chosen["held-out samples"], length),
            refit=(chosen["refit sequences"], chosen["refit length"]),
        )  # fmt: skip
        self._scores, self._text = dense.token_fisher(samples["scored"]), dense.ids(samples["refit"])
        self._evaluator = StructureEvaluator(dense.backend, dense.ids(samples["held"]))

    def plan(self, without: str) -> StructurePlan:
        """The plan of the default search, without the search, or with equal ratios in all modules."""
        graph, roles = self._dense.graph, (PrunableRole.FFN, PrunableRole.ATTENTION)
        space = SearchSpace(roles=roles, layout=Layout.ADAPTIVE, align=self._dense.align)
        strategy, guide = Strategy.UNIFORM if without == "module-ratios" else Strategy.ADAPTIVE, SearchGuide()
        if without == "everything":
            guide = SearchGuide(
                evaluator=self._evaluator, evaluations=self._candidates, reconstructed=True, seed=self._seed
            )
        return search(graph, self._scores, budget_for_ratio(graph, RATIO), space, strategy, guide)

    def model(self, plan: StructurePlan, without: str) -> nn.Module:
        """The pruned model without an addition."""
        if without == "restoration":
            return self._dense.pruned(plan)
        local = without != "local-choice"
        means = {group: score.mean for group, score in self._scores.items()} if local else None
        target = without != "residual-target"
        how = ReconstructionSettings(second_order=local, scores=means, residual_target=target)
        return self._dense.pruned(plan, self._text, how)


def summarise(cells: Cells) -> Values:
    found = {}
    for name in WITHOUT:
        ratios = [cell["ratio"] for key, cell in cells.items() if key.startswith(f"{name}-")]
        found[name] = {text: mean_and_spread([ratio[text] for ratio in ratios]) for text in MEASURED}
    full = found["everything"]["wikitext2"][0]
    loss = {name: values["wikitext2"][0] / full for name, values in found.items() if name != "everything"}
    most, least = max(loss, key=lambda name: loss[name]), min(loss, key=lambda name: loss[name])
    return {
        "variants": found, "meaning": WITHOUT, "factor": loss, "seeds": len(cells) // len(WITHOUT),
        "most": most, "least": least,
    }  # fmt: skip


def figures(summary: Values) -> Figures:
    names = list(summary["variants"])
    values = {text: [summary["variants"][name][text][0] for name in names] for text in MEASURED}
    labels = [name if name == "everything" else f"without {name}" for name in names]
    return [bars("ablation", values, labels, x="perplexity / dense")]
