"""The order of the stages: the only place where it is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from saap._version import __version__
from saap.baselines.baseline import Measurements
from saap.core.errors import ConfigurationError
from saap.core.records import ImportanceScores, Layout, ModelGraph, StructurePlan, digest_of
from saap.core.storage import read_plan
from saap.data.samples import Calibration
from saap.discovery import discover
from saap.discovery.summary import summarise
from saap.models.checkpoint.differences import mark_pruned, structure_of
from saap.models.loading.devices import copied, quick_float32_products, quick_products, require_whole_blocks
from saap.models.loading.pretrained import quiet_transformers
from saap.models.walk.probe import check_runs
from saap.models.walk.processes import Processes
from saap.pipeline.evaluate.speed import check_settings
from saap.pipeline.prune.baselines import biases_for, check_method, compensate, for_method
from saap.pipeline.prune.decode_costs import speed_settings
from saap.pipeline.prune.finish import Made, find_made, keep_made
from saap.pipeline.prune.fits import check_fits, check_weights_fit
from saap.pipeline.prune.forecast import forecast
from saap.pipeline.prune.generated_text import refit_tokens, write_text
from saap.pipeline.prune.planning import plans_for, scores_of, scores_of_choice
from saap.pipeline.prune.result import PruneResult
from saap.pipeline.prune.speed_target import budget_for_speed
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.inputs import (
    LoadedModel,
    RunOptions,
    TokenSets,
    chooses_units,
    draw_tokens,
    needs_measuring,
    open_model,
    place_of,
)
from saap.pipeline.shared.legality import check_walk, search_space
from saap.pipeline.shared.memory import (
    check_disk,
    clear_spill,
    dense_copy,
    open_within,
    refuse_offloaded,
    require_alone,
    restoration_spill,
)
from saap.pipeline.shared.meter import Meter
from saap.pipeline.shared.outcome import Behaviour, observe
from saap.pipeline.shared.progress import Reporter, Silent
from saap.pipeline.shared.stages import DISCOVER, ESTIMATE, LOAD, MEASURE_DENSE, READ_TEXT, TIME_DECODING, making
from saap.pipeline.shared.targets import Target, plan_targets, with_budgets, work_path
from saap.pipeline.shared.together import (
    alone_in,
    check_device_map,
    finish_together,
    shared_result,
    shared_work,
    with_device_of,
)
from saap.pipeline.shared.work import WorkFolder
from saap.settings.prune import PrunableRole, PruneConfig
from saap.structure_search.budget import Budget
from saap.structure_search.plan import SearchSpace, check_reachable
from saap.surgery.cut import cut
from saap.surgery.refit import RestoreSettings
from saap.surgery.restore import restore

__all__ = ["RunOptions", "inspect_model", "preview", "run_prune"]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Everything that can be refused has been checked."""

    targets: list[Target]
    loaded: LoadedModel
    graph: ModelGraph
    space: SearchSpace
    tokens: TokenSets


@quiet_transformers()
def run_prune(
    source: str | Path | nn.Module,
    config: PruneConfig,
    options: RunOptions,
    reporter: Reporter | None = None,
    *,
    calibration: Calibration | None = None,
    tokenizer: Any | None = None,
) -> list[PruneResult]:
    """Carry out a run: one result per target; discovery, estimation and the dense measurements are shared.

    calibration: in place of the configuration's names, e.g. texts or token ids. Everything that can be refused is
    refused before the estimation begins. Of several processes each gets the results. Raises SaapError.
    """
    config = for_method(config)
    processes = Processes.found()
    check_device_map(options, source, processes)
    options = with_device_of(processes, source, options)
    meter = Meter(reporter if reporter is not None and processes.first else Silent(), place_of(source, options))
    if options.max_memory is not None and options.out is None:
        raise _needs_folder()
    prepared = _prepare(source, config, options, meter, processes, calibration, tokenizer)
    processes.barrier()  # until nobody looks any more at what is there
    work = shared_work(processes, work_path(options))
    if processes.broadcast_result(lambda: work.open(_settings_digest(config, prepared))):
        meter.reporter.note(f"taking up the finished stages in {work.path}")
    run = Run(config, options, prepared.loaded, prepared.graph, prepared.space, prepared.tokens, work, meter, processes)
    with alone_in(work, processes), quick_float32_products():
        require_alone(run)
        check_disk(run, prepared.targets)
        clear_spill(run)
        results = _all_targets(run, prepared.targets)
    processes.barrier()
    processes.broadcast_result(lambda: work.close(keep=options.keep_work))
    return results


def preview(
    source: str | Path, config: PruneConfig, options: RunOptions, reporter: Reporter | None = None
) -> dict[str, Any]:
    """What `run_prune` would do and take, after all checks that it makes before the estimation.

    Raises SaapError, also if the memory or the disk of this machine is too small.
    """
    if Processes.found().count > 1:
        raise ConfigurationError("--dry-run tries one process alone", "Start it without torchrun or accelerate launch")
    check_device_map(options, source, Processes())
    config = for_method(config)
    meter = Meter(reporter if reporter is not None else Silent(), place_of(source, options))
    if options.max_memory is None:
        check_weights_fit(source, options)
    prepared = _prepare(source, config, options, meter, Processes(), None, None)
    refuse_offloaded(prepared.loaded, "--dry-run")
    tokens, trials = prepared.tokens, Meter(Silent(), meter.device)
    meter.reporter.note("trying a part of each stage on this machine")
    with TemporaryDirectory(prefix="saap-") as folder:
        work = WorkFolder(Path(folder))
        run = Run(config, options, prepared.loaded, prepared.graph, prepared.space, tokens, work, trials)
        found = forecast(run, prepared.targets, meter.stages)
    check_fits(found, run, options.out)
    return {
        "forecast": found.as_dict(),
        "model": str(source),
        "parameters": prepared.graph.parameters,
        "block_parameters": prepared.graph.block_parameters,
        "roles": [str(role) for role in config.roles],
        "targets": [
            {"name": target.name, "removal": target.budget.removal if isinstance(target.budget, Budget) else 0}
            for target in prepared.targets
        ],
        "tokens": {
            "importance": tokens.scored.tokens.size,
            "search": tokens.held.tokens.size if needs_measuring(config) else 0,
            "restoration": tokens.refit.tokens.size if config.restore else 0,
            "evaluation": tokens.evaluation.size,
        },
        "settings": config.model_dump(mode="json"),
    }


def inspect_model(source: str, options: RunOptions) -> dict[str, Any]:
    """The coupled structures of a model as JSON-able data: sizes, rows per role, what is not pruned and why."""
    loaded = open_model(source, options, computes_in_dtype=True)
    graph = discover(loaded.model, loaded.ref, finer_heads=True)
    return {
        "model": source,
        "parameters": graph.parameters,
        "block_parameters": graph.block_parameters,
        "blocks": len(graph.blocks),
        "roles": summarise(graph),
        "refused": [dataclasses.asdict(refusal) for refusal in graph.refused],
    }


def _prepare(
    source: str | Path | nn.Module,
    config: PruneConfig,
    options: RunOptions,
    meter: Meter,
    processes: Processes,
    calibration: Calibration | None,
    tokenizer: Any | None,
) -> _Prepared:
    targets = plan_targets(config, options)
    if config.target_speedup is not None:
        check_settings(speed_settings(config))
    with meter.stage(LOAD):
        loaded = open_within(source, config, options, tokenizer)
        _note_placement(loaded, options, meter)
    with meter.stage(READ_TEXT):
        tokens = draw_tokens(loaded, config, calibration if calibration is not None else config.calibration)
    if loaded.fresh is None:
        with tokens.images(loaded.model):
            check_runs(loaded.model, tokens.longest(loaded.model))
    with meter.stage(DISCOVER):
        skeleton = loaded.model if loaded.skeleton is None else loaded.skeleton
        graph = discover(skeleton, loaded.ref, finer_heads=PrunableRole.QUERY in config.roles)
        require_whole_blocks(loaded.model, graph.blocks)
        if loaded.fresh is None:
            check_walk(loaded.model, graph.blocks)
        check_method(config, graph)
        targets = with_budgets(targets, config, graph, loaded.dtype)
        space = search_space(loaded.model, graph, config)
        for target in targets:
            if target.budget is not None:
                check_reachable(graph, target.budget, space)
        if config.plan is not None:
            read_plan(config.plan, graph)
    if config.target_speedup is not None:
        with meter.stage(TIME_DECODING):
            budget = processes.broadcast_result(
                lambda: budget_for_speed(loaded.model, graph, space, config, meter.reporter)
            )
            check_reachable(graph, budget, space)
            targets = [dataclasses.replace(target, budget=budget) for target in targets]
    return _Prepared(targets, loaded, graph, space, tokens)


def _note_placement(loaded: LoadedModel, options: RunOptions, meter: Meter) -> None:
    """Say what does not lie in the memory of the model. Raises ConfigurationError if the result has no place."""
    if loaded.fresh is not None:
        if options.out is None:
            raise _needs_folder()
        meter.reporter.note("the weights stay in their files and are read block by block")
    if loaded.spills:
        meter.reporter.note("the activations of the restoration are kept outside the memory of the weights")


def _needs_folder() -> ConfigurationError:
    return ConfigurationError("A run of limited memory needs a folder for its result", "Name it with --out DIR")


def _settings_digest(config: PruneConfig, prepared: _Prepared) -> str:
    tokens = prepared.tokens
    return digest_of(
        [
            __version__,
            config.model_dump(mode="json"),
            prepared.graph.digest,
            str(prepared.loaded.dtype),
            [tokens.scored.digest, tokens.held.digest, tokens.refit.digest],
            "" if config.plan is None else config.plan.read_text(),
            *([] if prepared.loaded.fresh is None else ["weights in files"]),
        ]
    )


def _all_targets(run: Run, targets: Sequence[Target]) -> list[PruneResult]:
    """Measure, score and plan with the dense model for all targets, then make them one by one."""
    meter = run.meter
    with meter.stage(MEASURE_DENSE):
        dense = run.processes.broadcast_result(lambda: _dense_behaviour(run))
    write_text(run)
    with meter.stage(ESTIMATE):
        scores = scores_of(run)
    plans = plans_for(run, targets, scores)
    results = []
    for index, (target, plan) in enumerate(zip(targets, plans, strict=True)):
        finished = shared_result(run, target)
        if finished is None:
            last = index == len(targets) - 1
            needed = not last or run.config.target_speedup is not None  # to measure speed against
            made = _make(run, target, plan, scores, may_consume=run.loaded.owned and not needed)
            finished = finish_together(run, target, made, scores, dense)
        results.append(finished)
    return results


def _dense_behaviour(run: Run) -> Behaviour:
    saved = run.work.read_json(MEASURE_DENSE.file)
    if saved is not None:
        return Behaviour(**saved)
    dense = observe(run.loaded.model, run.loaded.tokenizer, run.tokens, run.spill)
    run.work.write_json(MEASURE_DENSE.file, dense.model_dump())
    return dense


def _make(run: Run, target: Target, plan: StructurePlan, scores: ImportanceScores, *, may_consume: bool) -> Made:
    """Cut and restore. may_consume: the dense model is not needed any more and may be changed in place."""
    found = run.processes.broadcast_result(lambda: find_made(run, target))
    if found is not None:
        return found
    model = dense_copy(run, target.name, _itself if may_consume else copied)
    with run.meter.stage(making(run.config.restore)):
        plan, errors = cut_and_restore(run, model, plan, scores)
        structure = structure_of(model, run.graph, plan)
        if plan.layout is Layout.ADAPTIVE and target.folder is None and hasattr(model, "save_pretrained"):
            mark_pruned(model, structure)
        return keep_made(run, target, model, plan, structure, errors, scores)


def cut_and_restore(
    run: Run, model: nn.Module, plan: StructurePlan, scores: ImportanceScores, found: Measurements | None = None
) -> tuple[StructurePlan, Mapping[str, float]]:
    """Carry out the plan on `model`, a dense one, in place. found: what the baselines have measured so far.

    Returns the plan with the units that were kept in the end, and the held-out errors of the restoration.
    """
    errors: Mapping[str, float] = {}
    biases = run.processes.broadcast_result(lambda: biases_for(run, model, plan, found))
    if run.config.restore and not plan.removes_nothing(run.graph):
        spill = restoration_spill(run.loaded, run.config, run.work.file("spill"))
        products = quick_products(run.device, run.loaded.dtype)
        backend = dataclasses.replace(run.backend, model=model, spill=spill, products=products)
        with run.tokens.images(model):
            restoration = restore(backend, plan, refit_tokens(run), restore_settings(run, scores))
        keep = {name: restoration.keep.get(name, kept) for name, kept in plan.keep.items()}
        plan, errors = dataclasses.replace(plan, keep=keep), restoration.errors
    cut(model, run.graph, plan)
    compensate(run, model, biases)
    return plan, errors


def restore_settings(run: Run, scores: ImportanceScores) -> RestoreSettings:
    """How the run restores. The second-order choice of units weighs scores in."""
    if not (chooses_units(run.config) and run.config.effort_settings.second_order):
        return RestoreSettings(second_order=False)
    return RestoreSettings(scores=scores_of_choice(run, scores))


def _itself(model: nn.Module) -> nn.Module:
    return model
