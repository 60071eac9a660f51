"""Cut only: plans of the search against those of the baselines on the same text, without any compensation."""

import numpy as np
from harness.digests import PRUNING
from harness.experiment import Cells, Measured, Names, Request, Scaled, Values
from lab.commands import VALIDATION
from lab.dense import Dense, Ratios, opened, source_of
from lab.texts import TEXTS

from saap.baselines.baseline import Baseline, Measurements
from saap.core.records import Layout, StructurePlan, UnitScores
from saap.settings.presets import PRESETS, Preset
from saap.settings.prune import PrunableRole
from saap.settings.registry import Method, Strategy
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.evaluator import StructureEvaluator
from saap.structure_search.plan import SearchSpace, search
from saap.structure_search.problem import SearchGuide

FFN, BOTH = (PrunableRole.FFN,), (PrunableRole.FFN, PrunableRole.ATTENTION)
BASELINES = {
    "LLM-Pruner element 1, FFN": (Method.LLM_PRUNER_ELEMENT1, FFN),
    "LLM-Pruner element 2, FFN": (Method.LLM_PRUNER_ELEMENT2, FFN),
    "LLM-Pruner element 2, FFN and attention": (Method.LLM_PRUNER_ELEMENT2, BOTH),
    "LLM-Pruner vector, FFN": (Method.LLM_PRUNER_VECTOR, FFN),
    "Wanda-sp": (Method.WANDA_SP, BOTH),
}
OURS = "saap"
SETTINGS = {
    "model": "{model}", "calibration": VALIDATION,
    "models": Scaled(["smollm2"], ["smollm2", "gemma-3-270m", "qwen2.5-coder-0.5b"]),
    "pruning ratios": Scaled([0.2], [0.1, 0.2, 0.3, 0.5]), "samples": Scaled(4, 50), "sample length": Scaled(32, 128),
    "held-out samples": Scaled(2, 16), "candidates": Scaled(3, PRESETS[Preset.DEFAULT].search_evaluations),
    "measured on": "wikitext2", "measured tokens": Scaled(512, 8192),
}  # fmt: skip
PARTIAL = True
DECIDED_BY = (*PRUNING, "baselines")


def cells(request: Request) -> Names:
    chosen = request.settings
    return [f"{model}/{ratio:g}" for model in chosen["models"] for ratio in chosen["pruning ratios"]]


def measure(request: Request, wanted: Names) -> Measured:
    chosen = request.settings
    for model in dict.fromkeys(cell.partition("/")[0] for cell in wanted):
        with opened(source_of(request, model)) as dense:
            text = chosen["measured on"]
            ratios = Ratios(dense, chosen["measured tokens"], {text: TEXTS[text]})
            prepared = Prepared(dense, chosen)
            for ratio in chosen["pruning ratios"]:
                if f"{model}/{ratio:g}" in wanted:
                    plans = prepared.plans(ratio)
                    yield f"{model}/{ratio:g}", {name: ratios.masked(plan)[text] for name, plan in plans.items()}


class Prepared:
    """Scores of one model by our default and by each baseline, and what candidates are measured on."""

    def __init__(self, dense: Dense, chosen: Values) -> None:
        self._dense, self._candidates, length = dense, chosen["candidates"], chosen["sample length"]
        samples = dense.samples(
            chosen["calibration"], scored=(chosen["samples"], length), held=(chosen["held-out samples"], length)
        )
        self._ours = dense.token_fisher(samples["scored"])
        self._evaluator = StructureEvaluator(dense.backend, dense.ids(samples["held"]))
        measurements = Measurements(dense.backend, dense.ids(samples["scored"]))
        self._theirs = {method: measurements.scores(method.load()) for method, _ in BASELINES.values()}

    def plans(self, ratio: float) -> dict[str, StructurePlan]:
        """The plan of each method."""
        graph, budget = self._dense.graph, budget_for_ratio(self._dense.graph, ratio)
        guide = SearchGuide(evaluator=self._evaluator, evaluations=self._candidates)
        space = SearchSpace(roles=BOTH, layout=Layout.ADAPTIVE, align=self._dense.align)
        found = {OURS: search(graph, self._ours, budget, space, Strategy.ADAPTIVE, guide)}
        for name, (method, roles) in BASELINES.items():
            baseline: Baseline = method.load()
            space = SearchSpace(
                roles=baseline.roles or roles, layout=Layout.ADAPTIVE, align=1, skip_layers=baseline.skip_layers
            )
            scores = {
                group: UnitScores(mean=np.asarray(values, dtype=np.float64), variance=np.zeros(len(values)))
                for group, values in self._theirs[method].items()
            }
            found[name] = search(graph, scores, budget, space, baseline.strategy)
        return found


def summarise(cells: Cells) -> Values:
    rows = {}
    for cell, found in cells.items():
        model, ratio = cell.split("/")
        best = min(BASELINES, key=lambda name: found[name])
        rows[f"{model}, {float(ratio):.0%}"] = {"ratios": found, "best": best, "quotient": found[OURS] / found[best]}
    quotients = [one["quotient"] for one in rows.values()]
    return {
        "rows": rows, "methods": [OURS, *BASELINES], "ahead": sum(one <= 1 for one in quotients), "count": len(rows),
        "least": min(quotients), "most": max(quotients),
    }  # fmt: skip
