"""Whole experts of two mixtures: which score chooses those to remove, how many of each layer, and what recovers."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from harness.charts import bars
from harness.digests import MAKING
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.commands import made_by_saap, timed_saap
from lab.dense import Dense, opened
from lab.mixtures import FULL, TRIAL, upcycled_folder
from lab.texts import TEXTS
from lab.training import FEW_STEPS, trained_folder

from saap.core.records import CalibrationSet, IntArray, Layout, Role, StructurePlan, UnitScores
from saap.estimation.estimate import estimate, unit_scores
from saap.models.structure.masking import masked
from saap.settings.presets import PRESETS, Preset
from saap.settings.prune import FusionScope, PrunableRole
from saap.settings.registry import Importance, Strategy
from saap.structure_search.budget import Budget
from saap.structure_search.evaluator import StructureEvaluator
from saap.structure_search.plan import SearchSpace, make_plan, search
from saap.structure_search.problem import SearchGuide
from saap.surgery.reconstruct import ReconstructionSettings

MODELS = ("upcycled", "trained")
CALIBRATIONS = ("mixed", "novels")
MEASURED = ("wikitext2", "novel")
SCORES = (
    Importance.REAP, Importance.FREQUENCY, Importance.RECONSTRUCTION, Importance.TOKEN_FISHER, Importance.FUSED,
)  # fmt: skip
COUNTS, MERGED = "counts", "merged"
"""Cells of each model, calibrated on the first text: other numbers of experts in each layer, and merged experts."""
COMPARED = (Importance.TOKEN_FISHER, Importance.REAP)
FITTED = Scaled((4, 32), (32, 256))
"""Sequences of the reconstruction and their length."""
OURS, RANDOM, ROUTER = str(Importance.TOKEN_FISHER), "random", "router"
RATIOS = {"25 %": 0.25, "50 %": 0.5}
MOST = "50 %"
DENSE = "dense"
"""The model that the upcycled mixture is made of."""
CELLS = [DENSE, *(f"{model}/{what}" for model in MODELS for what in (*CALIBRATIONS, ROUTER))]
EXTRA = [f"{model}/{what}" for model in MODELS for what in (COUNTS, MERGED)]
SETTINGS = {
    "model": "{model}", "calibrations": list(CALIBRATIONS), "measured on": list(MEASURED),
    "pruning ratios": list(RATIOS.values()), "samples": Scaled(4, 50), "sample length": Scaled(32, 128),
    "measured tokens": Scaled(512, 8192), "minutes of router tuning": 5, "seed": 0,
    "upcycled": Scaled(str(TRIAL), str(FULL)),
}  # fmt: skip
DECIDED_BY = MAKING


def measure(request: Request, wanted: Names) -> Measured:
    """Perplexities of the masked mixtures, equal numbers in all layers; nothing compensates except in `router`."""
    if DENSE in wanted:
        with opened(request.model) as dense:
            yield DENSE, {name: dense.perplexity(text) for name, text in texts_for(dense, request.settings).items()}
    for model in dict.fromkeys(cell.partition("/")[0] for cell in wanted if cell != DENSE):
        folder = upcycled_folder(request) if model == "upcycled" else trained_folder(request, "mixtral")
        with opened(str(folder)) as dense:
            for calibration in CALIBRATIONS:
                if f"{model}/{calibration}" in wanted:
                    yield f"{model}/{calibration}", of_scores(dense, calibration, request.settings)
            for name, measured in ((COUNTS, adaptive_counts), (MERGED, merged_experts)):
                if f"{model}/{name}" in wanted:
                    yield f"{model}/{name}", measured(request, dense)
            if f"{model}/{ROUTER}" in wanted:
                yield f"{model}/{ROUTER}", tuned_routers(request, model, folder, dense)


def of_scores(dense: Dense, calibration: str, chosen: Values) -> Values:
    """Perplexity on each text: unpruned, and by score and ratio."""
    samples = dense.samples(calibration, chosen["seed"], scored=(chosen["samples"], chosen["sample length"]))["scored"]
    texts = texts_for(dense, chosen)

    def perplexities() -> dict[str, float]:
        return {name: dense.perplexity(text) for name, text in texts.items()}

    found: dict[str, dict[str, Values]] = {}
    for score, orders in removal_orders(dense, samples, chosen["seed"]).items():
        found[score] = {}
        for name, ratio in RATIOS.items():
            with masked(dense.model, dense.graph, kept_of(orders, ratio)):
                found[score][name] = perplexities()
    return {"unpruned": perplexities(), "scores": found}


def adaptive_counts(request: Request, dense: Dense) -> Values:
    """Perplexity on each text by score and ratio, and the experts of each layer, where the search finds their numbers.

    As many experts are removed as with equal numbers, and nothing compensates.
    """
    chosen, preset = request.settings, PRESETS[Preset.DEFAULT]
    held = (request.size(2, preset.held_sequences), request.size(32, preset.held_length))
    sizes = {"scored": (chosen["samples"], chosen["sample length"]), "held": held}
    samples, texts = dense.samples(CALIBRATIONS[0], chosen["seed"], **sizes), texts_for(dense, chosen)
    space = SearchSpace(roles=(PrunableRole.EXPERT,), layout=Layout.ADAPTIVE, align=1)
    evaluator = StructureEvaluator(dense.backend, dense.ids(samples["held"]))
    guide = SearchGuide(evaluator=evaluator, evaluations=preset.search_evaluations)
    found: dict[str, dict[str, Values]] = {}
    for score in COMPARED:
        units, found[str(score)] = scores_of(dense, samples["scored"], score), {}
        for name, ratio in RATIOS.items():
            equal = equal_plan(dense, units, ratio)
            budget = Budget(removal=dense.graph.block_parameters - equal.block_parameters)
            plan = search(dense.graph, units, budget, space, Strategy.ADAPTIVE, guide)
            with masked(dense.model, dense.graph, plan.keep):
                values = {text: dense.perplexity(ids) for text, ids in texts.items()}
            kept = [len(plan.kept(one)) for one in dense.graph.of_role(Role.EXPERT)]
            found[str(score)][name] = {"perplexity": values, "kept": kept}
    return found


def merged_experts(request: Request, dense: Dense) -> Values:
    """Perplexity on each text by score and ratio, of experts that are dropped or merged before the reconstruction."""
    chosen = request.settings
    sizes = {"scored": (chosen["samples"], chosen["sample length"]), "refit": request.size(*FITTED)}
    samples, texts = dense.samples(CALIBRATIONS[0], chosen["seed"], **sizes), texts_for(dense, chosen)
    found: dict[str, dict[str, Values]] = {}
    for score in COMPARED:
        units, found[str(score)] = scores_of(dense, samples["scored"], score), {}
        for name, ratio in RATIOS.items():
            plan, values = equal_plan(dense, units, ratio), dict[str, Values]()
            for kind, merge in (("dropped", False), ("merged", True)):
                how = ReconstructionSettings(second_order=False, merge=merge)
                model = dense.pruned(plan, dense.ids(samples["refit"]), how)
                values[kind] = {text: dense.perplexity(ids, model) for text, ids in texts.items()}
            found[str(score)][name] = values
    return found


def scores_of(dense: Dense, samples: CalibrationSet, score: Importance) -> Mapping[str, UnitScores]:
    """The score of every expert, by group."""
    measured = estimate(dense.backend, samples, roles=[Role.EXPERT], importance=score)
    return unit_scores(measured, dense.graph, score, FusionScope.LAYER_ROLE)


def equal_plan(dense: Dense, units: Mapping[str, UnitScores], ratio: float) -> StructurePlan:
    """The plan without the same number of experts in all layers, those of the lowest scores."""
    return make_plan(
        dense.graph, kept_of(orders_of(units), ratio), (), layout=Layout.UNIFORM, strategy="equal", align=1
    )


def texts_for(dense: Dense, chosen: Values) -> dict[str, IntArray]:
    return {name: dense.text(TEXTS[name], chosen["measured tokens"]) for name in MEASURED}


def removal_orders(dense: Dense, samples: CalibrationSet, seed: int) -> Mapping[str, Mapping[str, list[int]]]:
    """By score and group, the experts from the first to the last that is removed."""
    generator = np.random.default_rng(seed)
    groups = dense.graph.of_role(Role.EXPERT)
    found = {RANDOM: {group.name: generator.permutation(group.units).tolist() for group in groups}}
    for score in SCORES:
        found[str(score)] = orders_of(scores_of(dense, samples, score))
    return found


def orders_of(units: Mapping[str, UnitScores]) -> dict[str, list[int]]:
    """By group, the experts from the lowest score to the highest."""
    return {name: np.argsort(one.mean, kind="stable").tolist() for name, one in units.items()}


def kept_of(orders: Mapping[str, list[int]], ratio: float) -> dict[str, tuple[int, ...]]:
    """By group, the experts that are left when the first ones of its order are removed."""
    return {name: tuple(sorted(order[round(ratio * len(order)) :])) for name, order in orders.items()}


def tuned_routers(request: Request, model: str, folder: Path, dense: Dense) -> Values:
    """What `saap recover --tuning router` makes of the mixture without half of its experts."""
    half = [(one, round(RATIOS[MOST] * one.units)) for one in dense.graph.of_role(Role.EXPERT)]
    removed = sum(count * one.parameters_per_unit(dense.graph.shapes) for one, count in half)
    ratio = f"{removed / dense.graph.block_parameters - 1e-4:.4f}"
    flags = ["--roles", "expert", "--importance", "reap", "--layout", "uniform", "--no-restore", "--preset", "fast"]
    name = f"{folder.name}-{request.size('trial', 'half')}-of-the-experts"
    pruned = made_by_saap(request, name, "prune", folder, "--pruning-ratio", ratio, *flags)
    limits = FEW_STEPS if request.quick else ["--max-minutes", str(request.settings["minutes of router tuning"])]
    with tempfile.TemporaryDirectory() as temporary:
        tune = ["recover", pruned, "--tune", "router", "--dense", folder, *limits, "--out", Path(temporary) / "tuned"]
        report, seconds, _ = timed_saap(*tune)
    names = ("perplexity_dense", "perplexity_before", "perplexity", "gap_closed")
    return {**{name: report[name] for name in names}, "seconds": round(seconds, 1)}


def summarise(cells: Cells) -> Values:
    rows = []
    for model in MODELS:
        for calibration in CALIBRATIONS:
            cell = cells[f"{model}/{calibration}"]
            for ratio in RATIOS:
                for text, unpruned in cell["unpruned"].items():
                    ratios = {score: found[ratio][text] / unpruned for score, found in cell["scores"].items()}
                    rows.append({
                        "model": model, "calibration": calibration, "removed": ratio, "text": text, "ratios": ratios,
                        "unpruned": unpruned, "best": min(ratios, key=lambda score: ratios[score]),
                        "quotient": ratios[OURS] / ratios[Importance.REAP],
                    })  # fmt: skip
    compared = compared_rows(cells)
    quotients = [row["quotient"] for row in rows if row["removed"] == MOST]
    return {
        "rows": rows, "scores": [*map(str, SCORES), RANDOM], "least": min(quotients), "most": max(quotients),
        "upcycling": {text: cells["upcycled/mixed"]["unpruned"][text] / found for text, found in cells[DENSE].items()},
        "routers": {model: cells[f"{model}/{ROUTER}"] for model in MODELS}, "half": RATIOS[MOST],
        "compared": compared, "better": {
            f"{one} than {other}": sum(row[one] < row[other] for row in compared)
            for one, other in (("adaptive", "equal"), ("dropped", "equal"), ("merged", "dropped"), ("merged", "equal"))
        },
        "wins": {score: sum(row["best"] == score for row in rows) for score in (*map(str, SCORES), RANDOM)},
    }  # fmt: skip


def compared_rows(cells: Cells) -> list[Values]:
    """Ratios to the unpruned mixture of equal and adaptive numbers, and of dropped and merged experts, if measured."""
    rows = list[Values]()
    for model in MODELS if set(EXTRA) <= set(cells) else ():
        equal, counts, merged = (cells[f"{model}/{what}"] for what in (CALIBRATIONS[0], COUNTS, MERGED))
        for score in map(str, COMPARED):
            for ratio in RATIOS:
                kept = counts[score][ratio]["kept"]
                for text, unpruned in equal["unpruned"].items():
                    perplexities = {
                        "equal": equal["scores"][score][ratio], "adaptive": counts[score][ratio]["perplexity"],
                        **merged[score][ratio],
                    }  # fmt: skip
                    ratios = {name: found[text] / unpruned for name, found in perplexities.items()}
                    row = {"model": model, "score": score, "removed": ratio, "text": text, **ratios}
                    rows.append({**row, "fewest": min(kept), "highest": max(kept)})
    return rows


def figures(summary: Values) -> Figures:
    rows = [row for row in summary["rows"] if row["removed"] == MOST]
    labels = [f"{row['model']}, {row['calibration']}: {row['text']}" for row in rows]
    values = {score: [row["ratios"][score] for row in rows] for score in summary["scores"]}
    return [bars("experts", values, labels, x="perplexity / unpruned")]
