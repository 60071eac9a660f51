"""What a run decides with the dense model: the scores of all units, and the structure of each target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.numpy import load_file, save

from saap.baselines.baseline import Measurements
from saap.core.records import (
    CalibrationSet,
    FloatArray,
    ImportanceScores,
    Role,
    StructurePlan,
    UnitScores,
    require_same,
)
from saap.core.storage import read_plan, read_scores, write_plan, write_scores, write_whole
from saap.estimation.estimate import estimate, unit_scores
from saap.estimation.token_fisher import token_fisher_scores
from saap.models.loading.devices import quick_products
from saap.pipeline.prune.baselines import baseline_scores, measurements
from saap.pipeline.prune.generated_text import with_written
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.inputs import (
    chooses_units,
    finds_costs,
    needs_measuring,
    text_of_costs,
    weighs_tokens,
)
from saap.pipeline.shared.memory import search_evaluations
from saap.pipeline.shared.stages import ESTIMATE, FIND_COSTS, SEARCH, WEIGH_TOKENS
from saap.pipeline.shared.targets import Target
from saap.settings.prune import PrunableRole, unit_roles
from saap.settings.registry import Importance, Method
from saap.structure_search.costs import SecondOrder, second_order_costs
from saap.structure_search.evaluator import EVALUATED_AT_ONCE, StructureEvaluator
from saap.structure_search.plan import complete_plan, plan_from_counts, search
from saap.structure_search.problem import SearchGuide

Progress = Callable[[int, int], None]
"""Called with what is done, and with all that is to be done."""


def scores_of(run: Run, found: Measurements | None = None) -> ImportanceScores:
    """Scores of all units, from the work folder if they lie there. found: what the baselines have measured so far."""
    path = run.work.file(ESTIMATE.file)
    tokens = with_written(run, "scored").cpu().numpy()
    calibration = dataclasses.replace(run.tokens.scored, tokens=tokens)
    if run.processes.broadcast_result(path.exists):
        scores = read_scores(path)
        require_same("The file of scores", expected=scores.graph_digest, found=run.graph.digest)
        require_same("The file of scores", expected=scores.calibration_digest, found=calibration.digest)
        return scores
    if run.config.method is not Method.SAAP:
        scores = run.processes.broadcast_result(
            lambda: baseline_scores(run, calibration.digest, found or measurements(run))
        )
        run.processes.broadcast_result(lambda: write_scores(path, scores))
        return scores
    scores = estimated(run, calibration)
    run.processes.broadcast_result(lambda: write_scores(path, scores))
    return scores


def estimated(run: Run, calibration: CalibrationSet) -> ImportanceScores:
    """The scores of a run's own method, on these samples."""
    with run.tokens.images(run.loaded.model):
        return estimate(
            run.backend, calibration, roles=unit_roles(run.config.roles) or [Role.FFN, Role.ATTENTION],
            importance=run.config.importance, element_order=run.config.element_order,
            aggregation=run.config.aggregation,
        )  # fmt: skip


def units_of(run: Run, scores: ImportanceScores) -> Mapping[str, UnitScores]:
    """The one score per unit that the search uses; a baseline's scores are taken as they are."""
    importance = run.config.importance if run.config.method is Method.SAAP else Importance.ELEMENT1
    return unit_scores(scores, run.graph, importance, run.config.fusion_scope)


def plans_for(run: Run, targets: Sequence[Target], scores: ImportanceScores) -> list[StructurePlan]:
    """The searched or given plan of every target; the dense model is only measured, not changed."""
    paths = {target.name: run.work.file(SEARCH.file_of(target.name)) for target in targets}
    found = run.processes.broadcast_result(lambda: {name for name, path in paths.items() if path.exists()})
    units = units_of(run, scores)
    element = unit_scores(scores, run.graph, Importance.ELEMENT2, run.config.fusion_scope)
    searched = any(target.budget and target.name not in found for target in targets)
    plans = []
    with run.tokens.images(run.loaded.model):
        guide = _guide(run, element) if searched else None
        for target in targets:
            path = paths[target.name]
            with run.meter.stage(SEARCH, target.name if len(targets) > 1 else ""):
                if target.name in found:
                    plans.append(complete_plan(run.graph, read_plan(path, run.graph)))
                    continue
                evaluator = guide.evaluator if guide is not None and target.budget is not None else None
                if isinstance(evaluator, StructureEvaluator) and not run.processes.first:
                    evaluator.serve()
                plan = run.processes.broadcast_result(partial(_plan, run, target, units, guide))
                run.processes.broadcast_result(partial(write_plan, path, plan, run.graph))
                plans.append(plan)
        if weighs_tokens(run.config) and not all(plan.removes_nothing(run.graph) for plan in plans):
            _weigh_tokens(run)
    return plans


def _weigh_tokens(run: Run) -> None:
    """Put the token-level Fisher importance of each unit into the work folder, if it is not there."""
    path = run.work.file(WEIGH_TOKENS.file)
    if run.processes.broadcast_result(path.exists):
        return
    with run.meter.stage(WEIGH_TOKENS):
        found = token_scores(run, *text_of_costs(run.tokens, run.device), run.meter.reporter.advance)
        run.processes.broadcast_result(lambda: write_whole(path, save(found)))


def token_scores(run: Run, tokens: torch.Tensor, micro_batch: int, progress: Progress) -> dict[str, FloatArray]:
    """By group, the token-level Fisher importance of each unit."""
    products = quick_products(run.device, run.loaded.dtype)
    backend = dataclasses.replace(run.backend, products=products, progress=progress)
    return token_fisher_scores(backend, tokens, micro_batch=micro_batch, ignored=run.tokens.refit.ignored)


def unit_costs(run: Run, tokens: torch.Tensor, micro_batch: int, progress: Progress) -> SecondOrder:
    """Second-order costs of all units."""
    backend = dataclasses.replace(run.backend, progress=progress)
    return second_order_costs(backend, tokens, micro_batch=micro_batch, ignored=run.tokens.scored.ignored)


def scores_of_choice(run: Run, scores: ImportanceScores) -> dict[str, FloatArray]:
    """By group, what the choice of units weighs in: token-level Fisher importance, or else the element-wise scores."""
    path = run.work.file(WEIGH_TOKENS.file)
    fisher = load_file(path) if weighs_tokens(run.config) and path.exists() else {}
    return {name: group.element for name, group in scores.groups.items()} | fisher


def _guide(run: Run, element: Mapping[str, UnitScores]) -> SearchGuide:
    """Second-order costs for the adaptive strategy, and the evaluator if structures are to be measured.

    Gram matrices larger than the weights are not collected: the search then masks without compensation.
    """
    config, model, graph = run.config, run.loaded.model, run.graph
    evaluations, costs, evaluator = search_evaluations(run), None, None
    if finds_costs(config, model, graph):
        with run.meter.stage(FIND_COSTS):
            costs = unit_costs(run, *text_of_costs(run.tokens, run.device), run.meter.reporter.advance)
    if needs_measuring(config) and (evaluations or PrunableRole.BLOCK in config.roles):
        grams, held = None if costs is None else costs.grams, with_written(run, "held")
        at_once = EVALUATED_AT_ONCE if run.loaded.fresh is None else len(held)
        evaluator = StructureEvaluator(run.backend, held, grams, at_once, ignored=run.tokens.held.ignored)
    return SearchGuide(
        element_scores=element if chooses_units(config) else None,
        costs=costs,
        evaluator=evaluator,
        evaluations=evaluations,
        seed=config.seed,
        progress=run.meter.reporter.advance,
    )


def _plan(run: Run, target: Target, units: Mapping[str, UnitScores], guide: SearchGuide | None) -> StructurePlan:
    config, graph = run.config, run.graph
    if target.budget is None or guide is None:
        given = read_plan(config.plan or Path(), graph)
        return plan_from_counts(
            graph, units, given.keep(graph), given.dropped_blocks, layout=given.layout, align=given.align
        )
    plan = search(graph, units, target.budget, run.space, config.strategy, guide)
    if isinstance(guide.evaluator, StructureEvaluator):
        guide.evaluator.done()
    return plan
