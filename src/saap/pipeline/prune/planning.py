"""What a run decides with the dense model: the scores of all units, and the structure of each target."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from saap.core.errors import listed
from saap.core.records import ImportanceScores, ModelGraph, Role, StructurePlan, UnitScores, require_same
from saap.core.storage import read_plan, read_scores, write_scores
from saap.estimation.estimate import estimate, unit_scores, unused_experts
from saap.models.loading.devices import quick_products
from saap.models.walk.observer import Observer
from saap.models.walk.offload import offloaded
from saap.models.walk.spill import Spill
from saap.pipeline.prune.baselines import baseline_scores
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.outcome import Behaviour, observe
from saap.pipeline.shared.targets import Target
from saap.settings.prune import PruneConfig, unit_roles
from saap.settings.registry import Importance, Method
from saap.structure_search.budget import Budget
from saap.structure_search.evaluator import EVALUATED_AT_ONCE, StructureEvaluator
from saap.structure_search.plan import SearchSpace, check_reachable, complete_plan, flat_scores, search
from saap.structure_search.problem import SearchGuide
from saap.structure_search.second_order import SecondOrder, WeightedGrams

WALK = "estimation"
"""Folder of the finished blocks of the estimation, until all are."""
SEARCH_SHARE = 0.2
READING_TOKENS = 256
"""Reading a block takes about as long as passing so many tokens through it."""


def measure_dense(run: Run) -> Behaviour:
    """What the dense model does, measured in the first process; before its vocabulary was pruned, if it was."""
    if run.vocabulary is not None:
        return run.vocabulary.dense
    return run.processes.broadcast_result(
        lambda: observe(run.loaded.model, run.loaded.tokenizer, run.tokens, run.spill, run.tokens.dense)
    )


def scored_roles(config: PruneConfig) -> Sequence[Role]:
    """The roles whose units are scored; whole blocks are scored by their FFN and attention."""
    return unit_roles(config.roles) or (Role.FFN, Role.ATTENTION)


def scores_decide(run: Run) -> bool:
    """Whether importance decides anything: not where whole blocks alone are dropped, or plans list all their units."""
    config = run.config
    if config.plan is None:
        return config.method is not Method.SAAP or bool(unit_roles(config.block_roles))
    plans = [target.plan for target in run.targets if target.plan is not None]
    return any(isinstance(kept, int) for plan in plans for kept in plan.keep(run.graph).values())


def trial_plan(graph: ModelGraph, target: Target, space: SearchSpace) -> StructurePlan:
    """A plan with the sizes of a target, made without scores. Raises TargetError or PlanError if there is none."""
    if target.plan is not None:
        return complete_plan(graph, target.plan, flat_scores(graph))
    return check_reachable(graph, target.budget, space)


def estimate_scores(run: Run, also: Sequence[Observer] = ()) -> ImportanceScores:
    """Scores of all units by the method of the run. also: others that listen in the walk."""
    if run.config.method is not Method.SAAP:
        return run.processes.broadcast_result(lambda: baseline_scores(run))
    config, backend = run.config, run.backend
    if backend.spill is not None and not also:
        resumed = partial(run.meter.reporter.note, "the estimation resumes after its last finished block")
        backend = dataclasses.replace(backend, spill=Spill(run.work.file(WALK), resumed))
    if config.importance is Importance.TOKEN_FISHER:  # the others are sums that cancel, which rounding disturbs
        backend = dataclasses.replace(backend, products=quick_products(run.device, run.loaded.dtype))
    scores = estimate(
        backend, run.tokens.scored, roles=scored_roles(config),
        importance=config.importance, element_order=config.element_order, aggregation=config.aggregation, also=also,
    )  # fmt: skip
    unused = unused_experts(scores, run.graph)
    if unused:
        count, every = sum(map(len, unused.values())), sum(group.units for group in run.graph.of_role(Role.EXPERT))
        names = listed([f"{', '.join(map(str, units))} of {name}" for name, units in unused.items()], 6)
        run.meter.reporter.note(f"{count} of {every} experts got no calibration token and are removed first: {names}")
    return scores


def read_run_scores(run: Run, path: Path) -> ImportanceScores:
    """The scores of an interrupted run. Raises StaleInputError for those of another one."""
    scores = read_scores(path)
    require_same("The file of scores", expected=scores.graph_digest, found=run.graph.digest)
    require_same("The file of scores", expected=scores.calibration_digest, found=run.tokens.scored.digest)
    return scores


class Costs(NamedTuple):
    """What one walk has found: the scores of all units, and their second-order costs."""

    scores: ImportanceScores
    second_order: SecondOrder


def find_costs(run: Run) -> Costs:
    """Importance and second-order costs of all units, from the same samples."""
    grams = WeightedGrams(run.backend, run.tokens.tensor("scored", run.device), scored_roles(run.config))
    return Costs(estimate_scores(run, [grams]), grams.result())


def write_run_scores(run: Run, path: Path, scores: ImportanceScores) -> None:
    """Write the scores, and delete what an interrupted estimation would resume from."""
    write_scores(path, scores)
    shutil.rmtree(run.work.file(WALK), ignore_errors=True)


def evaluate_dense(run: Run, costs: Costs | None) -> StructureEvaluator:
    """What structures are evaluated by, with the dense model's predictions."""
    held = run.tokens.tensor("held", run.device)
    at_once = EVALUATED_AT_ONCE if run.loaded.fresh is None else len(held)
    grams = None if costs is None else costs.second_order.grams
    return StructureEvaluator(run.backend, held, grams, at_once, ignored=run.tokens.held.ignored)


def chosen_scores(run: Run, scores: ImportanceScores) -> Mapping[str, UnitScores]:
    """By group, the score of each unit that the settings name; a baseline's are taken as they are."""
    importance = run.config.importance if run.config.method is Method.SAAP else Importance.ELEMENT1
    return unit_scores(scores, run.graph, importance, run.config.fusion_scope)


def search_plan(
    run: Run, target: Target, scores: ImportanceScores | None, costs: Costs | None,
    evaluator: StructureEvaluator | None,
) -> StructurePlan:  # fmt: skip
    """The searched or given plan of a target; of several processes the first one decides, and the others evaluate.

    scores: None where they decide nothing.
    """
    config, graph = run.config, run.graph
    units = {} if scores is None else chosen_scores(run, scores)

    def decide() -> StructurePlan:
        if target.plan is not None:
            return complete_plan(graph, target.plan, units)
        guide = SearchGuide(
            costs=None if costs is None else costs.second_order, evaluator=evaluator,
            evaluations=search_evaluations(run), progress=run.meter.reporter.advance,
        )  # fmt: skip
        plan = search(graph, units, target.budget or Budget(removal=0), run.space, config.strategy, guide)
        if evaluator is not None:
            evaluator.done()
        return plan

    if evaluator is not None and not run.processes.first:
        evaluator.serve()
    return run.processes.broadcast_result(decide)


def read_whole_plan(run: Run, path: Path) -> StructurePlan:
    """The plan of a file that saap wrote."""
    return complete_plan(run.graph, read_plan(path, run.graph))


def search_evaluations(run: Run) -> int:
    """How many candidates the search may measure.

    Each of them reads all weights if these are in files; so that all together take at most a fifth of the time of the
    estimation, their number follows from the tokens: the estimation passes its tokens about four times through each
    block (forward, again, back, gradients of weights) and reads it twice; a candidate passes its own once.
    """
    wanted = run.config.preset_settings.search_evaluations
    if offloaded(run.loaded.model) is None:
        return wanted
    if any(member.part is not None for group in run.graph.groups for member in group.members):
        return 0
    estimating = 4 * run.tokens.scored.tokens.size + 2 * READING_TOKENS
    measuring = run.tokens.held.tokens.size + READING_TOKENS
    affordable = int(SEARCH_SHARE * estimating / measuring) - 1  # the dense model is measured as well
    return min(wanted, affordable) if affordable >= 2 else 0
