"""The order of the stages: the only place where it is written."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saap.config import Importance, PrunableRole, PruneConfig
from saap.data.samples import Calibration
from saap.discovery import discover
from saap.discovery.summary import summarise
from saap.estimation import estimate
from saap.estimation.selection import unit_scores
from saap.models.uniform import uniform_config
from saap.pipeline.diagnosis import diagnose_importance, diagnose_memory, diagnose_result, diagnose_search
from saap.pipeline.inputs import LoadedModel, RunOptions, TokenSets, draw_tokens, needs_measuring, open_model
from saap.pipeline.meter import Meter
from saap.pipeline.outcome import Behaviour, observe
from saap.pipeline.progress import Reporter, Silent
from saap.pipeline.report import PruneReport, PruneResult, load_lines, structure_of
from saap.pipeline.work import WorkFolder
from saap.records import ImportanceScores, Layout, ModelGraph, Role, StructurePlan, digest_of
from saap.structure_search.judge import MaskedJudge
from saap.structure_search.objectives import Budget, budget_for_bytes, budget_for_parameters, budget_for_ratio
from saap.structure_search.plan import SearchSpace, check_reachable, plan_from_counts, search
from saap.storage import load_graph, load_scores, read_plan, save_graph, save_plan, save_scores
from saap.surgery.cut import cut
from saap.surgery.restore import RestoreSettings, final_keep, restore

__all__ = ["RunOptions", "inspect_model", "preview", "run_prune"]


@dataclass(frozen=True, slots=True)
class Target:
    """One result that was asked for. name: of its folder and stage files. budget: None where a plan is given."""

    name: str
    budget: Budget | None
    folder: Path | None


@dataclass(frozen=True, slots=True)
class Run:
    """What all stages of a run share."""

    config: PruneConfig
    options: RunOptions
    loaded: LoadedModel
    graph: ModelGraph
    tokens: TokenSets
    work: WorkFolder
    meter: Meter


def run_prune(
    source: str | Path | nn.Module,
    config: PruneConfig,
    options: RunOptions,
    reporter: Reporter | None = None,
    *,
    calibration: Calibration | None = None,
    tokenizer: Any | None = None,
) -> list[PruneResult]:
    """Carry out a run: one result per target, sharing discovery and estimation.

    calibration: overrides the configuration's names with texts or token ids. Everything that can be refused is
    refused before the estimation begins. Raises SaapError.
    """
    reporter = reporter if reporter is not None else Silent()
    meter = Meter(reporter)
    targets = _folders(config, options)
    with meter.stage("load the model"):
        loaded = open_model(source, options, tokenizer)
    with meter.stage("discover the coupled structures"):
        graph = discover(loaded.model, loaded.ref)
    targets = _budgets(targets, config, graph, loaded)
    with meter.stage("read the calibration text"):
        tokens = draw_tokens(loaded, config, calibration if calibration is not None else config.calibration)
    work = WorkFolder(_work_path(options))
    resumed = work.open(_settings_digest(config, loaded, tokens))
    if resumed:
        reporter.note(f"taking up the finished stages in {work.path}")
    results = _all_targets(Run(config, options, loaded, graph, tokens, work, meter), targets)
    if not options.keep_work:
        work.remove()
    return results


def _all_targets(run: Run, targets: Sequence[Target]) -> list[PruneResult]:
    """Measure, score and plan with the dense model for all targets, then make them one by one."""
    config, meter = run.config, run.meter
    with meter.stage("measure the dense model"):
        dense = _dense_behaviour(run)
    with meter.stage("estimate the importance of every unit"):
        scores = _scores(run)
        units = unit_scores(scores, run.graph, config.importance, config.fusion_scope)
    judge = None
    plans = []
    for target in targets:
        with meter.stage(f"search the structure ({target.name})"):
            if judge is None and needs_measuring(config):
                judge = MaskedJudge(run.loaded.model, run.graph, run.tokens.tensor("held", _device(run)))
            plans.append(_plan(run, target, units, judge))
    del judge
    results = []
    for index, (target, plan) in enumerate(zip(targets, plans, strict=True)):
        last = index == len(targets) - 1
        results.append(_make(run, target, plan, scores, dense, may_consume=last and run.loaded.owned))
    return results


def _dense_behaviour(run: Run) -> Behaviour:
    saved = run.work.read_json("dense.json")
    if saved is not None:
        return Behaviour(**saved)
    dense = observe(run.loaded.model, run.loaded, run.tokens)
    run.work.write_json("dense.json", dense.as_dict())
    return dense


def _scores(run: Run) -> ImportanceScores:
    path = run.work.file("scores.safetensors")
    if path.exists():
        scores = read_scores(path)
        require_same("the scores in the work folder", expected=scores.graph_digest, found=run.graph.digest)
        require_same(
            "the scores in the work folder", expected=scores.calibration_digest, found=run.tokens.scored.digest
        )
        return scores
    roles = [Role(role.value) for role in run.config.roles if role is not PrunableRole.BLOCK]
    scores = estimate(
        run.loaded.model,
        run.graph,
        run.tokens.scored,
        roles=roles or [Role.FFN, Role.ATTENTION],
        element_order=run.config.element_score,
        aggregation=run.config.aggregation,
        progress=run.meter.reporter.advance,
    )
    write_scores(path, scores)
    return scores


def _plan(run: Run, target: Target, units: Mapping[str, UnitScores], judge: MaskedJudge | None) -> StructurePlan:
    config, graph = run.config, run.graph
    path = run.work.file(f"plan-{target.name}.json")
    if path.exists():
        return read_plan(path, graph).structure_plan(graph)
    if target.budget is None:
        given = read_plan(require(config.plan), graph)
        plan = plan_from_counts(graph, units, given.keep, given.dropped_blocks, layout=given.layout, align=given.align)
    else:
        plan = search(
            graph,
            units,
            target.budget,
            _space(config),
            config.strategy,
            judge=judge,
            evaluations=config.effort_settings.search_evaluations,
            seed=config.seed,
            progress=run.meter.reporter.advance,
        )
    write_plan(path, plan, graph)
    return plan


def _make(
    run: Run,
    target: Target,
    plan: StructurePlan,
    scores: ImportanceScores,
    dense: Behaviour,
    *,
    may_consume: bool,
) -> PruneResult:
    """Cut, restore, write, open again, measure. may_consume: the dense model is not needed any more."""
    raise NotImplementedError


def _restore_settings(config: PruneConfig) -> RestoreSettings:
    return RestoreSettings(second_order=config.effort_settings.second_order)


def _device(run: Run) -> torch.device:
    return next(run.loaded.model.parameters()).device


def _space(config: PruneConfig) -> SearchSpace:
    return SearchSpace(roles=config.roles, layout=config.layout, align=config.align, skip_layers=config.skip_layers)
