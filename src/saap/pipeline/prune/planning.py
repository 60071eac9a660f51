"""What a run decides with the dense model: the scores of all units, and the structure of each target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.numpy import load_file, save

from saap.baselines.methods import Measurements
from saap.core.records import FloatArray, ImportanceScores, Role, StructurePlan, UnitScores, require_same
from saap.core.storage import read_plan, read_scores, write_plan, write_scores, write_whole
from saap.estimation.calibrate import estimate
from saap.estimation.selection import unit_scores
from saap.estimation.token_fisher import felt_scores
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
from saap.pipeline.shared.memory import (
    search_evaluations,
    spill_of,
)
from saap.pipeline.shared.targets import Target
from saap.settings.prune import Importance, Method, PrunableRole, unit_roles
from saap.structure_search.costs import SecondOrder, second_order_costs
from saap.structure_search.evaluator import JUDGED_AT_ONCE, StructureJudge
from saap.structure_search.plan import complete_plan, plan_from_counts, search

FELT = "felt.safetensors"


def scores_of(run: Run, found: Measurements | None = None) -> ImportanceScores:
    """Scores of all units, from the work folder if they lie there. found: what the baselines have measured so far."""
    path = run.work.file("scores.safetensors")
    tokens = with_written(run, "scored").cpu().numpy()
    calibration = dataclasses.replace(run.tokens.scored, tokens=tokens)
    if run.processes.from_first(path.exists):
        scores = read_scores(path)
        require_same("The file of scores", expected=scores.graph_digest, found=run.graph.digest)
        require_same("The file of scores", expected=scores.calibration_digest, found=calibration.digest)
        return scores
    if run.config.method is not Method.SAAP:
        scores = run.processes.from_first(lambda: baseline_scores(run, calibration.digest, found or measurements(run)))
        run.processes.from_first(lambda: write_scores(path, scores))
        return scores
    with run.tokens.images(run.loaded.model):
        scores = estimate(
            run.loaded.model,
            run.graph,
            calibration,
            roles=unit_roles(run.config.roles) or [Role.FFN, Role.ATTENTION],
            element_order=run.config.element_score,
            aggregation=run.config.aggregation,
            spill=spill_of(run),
            progress=run.meter.reporter.advance,
            processes=run.processes,
        )
    run.processes.from_first(lambda: write_scores(path, scores))
    return scores


def units_of(run: Run, scores: ImportanceScores) -> Mapping[str, UnitScores]:
    """The one score per unit that the search uses; a baseline's scores are taken as they are."""
    importance = run.config.importance if run.config.method is Method.SAAP else Importance.ELEMENT1
    return unit_scores(scores, run.graph, importance, run.config.fusion_scope)


def plans_for(run: Run, targets: Sequence[Target], scores: ImportanceScores) -> list[StructurePlan]:
    """The searched or given plan of every target; the dense model is only measured, not changed."""
    paths = {target.name: run.work.file(f"plan-{target.name}.json") for target in targets}
    found = run.processes.from_first(lambda: {name for name, path in paths.items() if path.exists()})
    units = units_of(run, scores)
    element = unit_scores(scores, run.graph, Importance.ELEMENT2, run.config.fusion_scope)
    searched = any(target.budget and target.name not in found for target in targets)
    plans = []
    with run.tokens.images(run.loaded.model):
        measured = _measure(run) if searched else None
        for target in targets:
            path = paths[target.name]
            with run.meter.stage(f"search the structure{_label(targets, target)}"):
                if target.name in found:
                    plans.append(complete_plan(run.graph, read_plan(path, run.graph)))
                    continue
                judge = measured.judge if measured is not None and target.budget is not None else None
                if judge is not None and not run.processes.first:
                    judge.serve()
                plan = run.processes.from_first(partial(_plan, run, target, units, element, measured))
                run.processes.from_first(partial(write_plan, path, plan, run.graph))
                plans.append(plan)
        if weighs_tokens(run.config) and not all(plan.removes_nothing(run.graph) for plan in plans):
            _weigh_tokens(run)
    return plans


def _weigh_tokens(run: Run) -> None:
    """Put into the work folder what the loss feels of each unit token by token, if it is not there."""
    path = run.work.file(FELT)
    if run.processes.from_first(path.exists):
        return
    with run.meter.stage("weigh every unit token by token"):
        tokens, rows = text_of_costs(run.tokens, run.device)
        found = felt_scores(
            run.loaded.model, run.graph, tokens, micro_batch=rows, ignored=run.tokens.refit.ignored,
            spill=spill_of(run), progress=run.meter.reporter.advance, processes=run.processes,
            products=quick_products(run.device, run.loaded.dtype),
        )  # fmt: skip
        run.processes.from_first(lambda: write_whole(path, save(found)))


def scores_of_choice(run: Run, scores: ImportanceScores) -> dict[str, FloatArray]:
    """By group, what the restoration's choice of units weighs in: scores token by token, or else element-wise ones."""
    path = run.work.file(FELT)
    felt = load_file(path) if weighs_tokens(run.config) and path.exists() else {}
    return {name: group.element for name, group in scores.groups.items()} | felt


@dataclass(frozen=True, slots=True)
class _Measured:
    """What the adaptive search knows of the model beside the scores."""

    costs: SecondOrder | None
    judge: StructureJudge | None


def _measure(run: Run) -> _Measured:
    """Second-order costs for the adaptive strategy, and the judge if structures are to be measured.

    Gram matrices larger than the weights are not collected: the search then masks without compensation.
    """
    config, model, graph = run.config, run.loaded.model, run.graph
    costs = None
    if finds_costs(config, model, graph):
        with run.meter.stage("find the second-order cost of every unit"):
            tokens, rows = text_of_costs(run.tokens, run.device)
            costs = second_order_costs(
                model, graph, tokens, micro_batch=rows,
                ignored=run.tokens.scored.ignored, spill=spill_of(run), progress=run.meter.reporter.advance,
                processes=run.processes,
            )  # fmt: skip
    judge = None
    if needs_measuring(config) and (search_evaluations(run) or PrunableRole.BLOCK in config.roles):
        grams, held = None if costs is None else costs.grams, with_written(run, "held")
        at_once = JUDGED_AT_ONCE if run.loaded.fresh is None else len(held)
        judge = StructureJudge(
            model, graph, held, grams, at_once, ignored=run.tokens.held.ignored, processes=run.processes
        )
    return _Measured(costs, judge)


def _plan(
    run: Run,
    target: Target,
    units: Mapping[str, UnitScores],
    element: Mapping[str, UnitScores],
    measured: _Measured | None,
) -> StructurePlan:
    config, graph = run.config, run.graph
    if target.budget is None or measured is None:
        given = read_plan(config.plan or Path(), graph)
        return plan_from_counts(graph, units, given)
    plan = search(
        graph,
        units,
        target.budget,
        run.space,
        config.strategy,
        element_scores=element if chooses_units(config) else None,
        costs=measured.costs,
        judge=measured.judge,
        evaluations=search_evaluations(run),
        seed=config.seed,
        progress=run.meter.reporter.advance,
    )
    if measured.judge is not None:
        measured.judge.done()
    return plan


def _label(targets: Sequence[Target], target: Target) -> str:
    return f" ({target.name})" if len(targets) > 1 else ""
