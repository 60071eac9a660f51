"""`saap prune`: what is refused at once, then the loop over the stages; its dry run, and `saap inspect`."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from saap._version import __version__
from saap.core.errors import ConfigurationError, PlanError, listed
from saap.core.records import ModelGraph, ModelRef, digest_of
from saap.core.storage import PlanDocument
from saap.data.samples import Calibration
from saap.data.texts import check_source, names_a_source
from saap.discovery import discover
from saap.discovery.summary import summarise
from saap.models.loading.devices import quick_float32_products, require_whole_blocks
from saap.models.loading.pretrained import model_without_weights, quiet_transformers
from saap.models.loading.references import resolve_model
from saap.models.walk.backend import Backend
from saap.models.walk.probe import check_runs
from saap.models.walk.processes import Processes
from saap.pipeline.prune.baselines import check_method, for_method, require_own_roles, with_measurements
from saap.pipeline.prune.forecast import SMALLER, check_fits, check_weights_fit, forecast
from saap.pipeline.prune.given_plan import read_given_plan
from saap.pipeline.prune.planning import scores_decide, trial_plan
from saap.pipeline.prune.result import PruneResult
from saap.pipeline.prune.source_file import (
    Experts,
    check_layers,
    file_budget,
    folder_experts,
    for_source_file,
    notes,
    source_bytes,
)
from saap.pipeline.prune.speed_target import budget_for_speed
from saap.pipeline.prune.steps import carry_out
from saap.pipeline.prune.vocabulary import prune_vocabulary
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.inputs import LoadedModel, RunOptions, check_devices, place_of
from saap.pipeline.shared.legality import check_walk, search_space
from saap.pipeline.shared.memory_estimate import Sizes
from saap.pipeline.shared.memory_limit import offloading_remedy, open_within, restoration_spill
from saap.pipeline.shared.meter import Meter
from saap.pipeline.shared.progress import Reporter, Silent
from saap.pipeline.shared.stages import DISCOVER, LOAD, PRUNE_VOCABULARY, READ_TEXT, TIME_DECODING
from saap.pipeline.shared.targets import Target, check_space, finished_report, plan_targets, with_budgets, work_path
from saap.pipeline.shared.tokens import draw_tokens, needs_measuring
from saap.pipeline.shared.work import WorkFolder
from saap.settings.prune import PrunableRole, PruneConfig
from saap.structure_search.budget import Budget
from saap.structure_search.plan import SearchSpace, check_reachable
from saap.surgery.cut import check_block_removal
from saap.surgery.merging import require_mergeable

__all__ = ["RunOptions", "inspect_model", "preview", "run_prune"]

DISK_SPARE = 1.05


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
    if options.max_memory is not None and options.out is None:
        raise _needs_folder()
    processes = Processes.found()
    run = _prepare(source, config, options, reporter, processes, calibration, tokenizer)
    work, meter = run.work, run.meter
    processes.barrier()  # until all processes have checked the existing files
    if processes.broadcast_result(lambda: work.open(_settings_digest(run))):
        meter.reporter.note(f"resuming the finished stages in {work.path}")
    with work.alone(processes), quick_float32_products():
        processes.broadcast_result(lambda: _check_disk(run))
        found = carry_out(run, ("result",))
    processes.barrier()
    processes.broadcast_result(lambda: work.close(keep=options.keep_work))
    return [found["result", target.name] for target in run.targets]


def preview(
    source: str | Path, config: PruneConfig, options: RunOptions, reporter: Reporter | None = None
) -> dict[str, Any]:
    """What `run_prune` would do and take, after all checks that it makes before the estimation.

    Raises SaapError, also if the memory or the disk of this machine is too small.
    """
    smaller = offloading_remedy(source, config, options) or SMALLER
    if options.max_memory is None:
        check_weights_fit(source, options, smaller)
    run = _prepare(source, config, options, reporter, Processes())
    if run.loaded.fresh is not None:
        raise ConfigurationError(
            "--dry-run is of runs with all weights in memory, which is too small for them",
            "Leave out --dry-run; a limit that is too small for the run itself is refused at once",
        )
    found = forecast(run)
    check_fits(found, run, smaller)
    graph, tokens = run.graph, run.tokens
    return {
        "forecast": found.as_dict(),
        "model": str(source),
        "parameters": run.dense_parameters,
        "block_parameters": graph.block_parameters,
        "vocabulary": None if run.vocabulary is None else run.vocabulary.record.model_dump(),
        "roles": [str(role) for role in run.config.block_roles],
        "targets": [
            {"name": target.name, "removal": target.budget.removal if isinstance(target.budget, Budget) else 0}
            for target in run.targets
        ],
        "tokens": {
            "importance": tokens.scored.tokens.size if scores_decide(run) else 0,
            "search": tokens.held.tokens.size if needs_measuring(run.config) else 0,
            "reconstruction": tokens.refit.tokens.size if run.config.restore else 0,
            "evaluation": sum(ids.size for ids in tokens.evaluation.values()),
        },
        "settings": run.config.model_dump(mode="json"),
    }


def inspect_model(source: str, options: RunOptions) -> dict[str, Any]:
    """The coupled structures of a model as JSON-able data: sizes, rows per role, what is not pruned and why."""
    resolved = resolve_model(source, options.revision, options.trust_remote_code, weights=False)
    model = model_without_weights(resolved, with_buffers=True)
    ref = ModelRef(source=source, config_digest="", weights_digest="")  # nothing is compared with it
    graph = discover(model, ref, finer_heads=True)
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
    reporter: Reporter | None,
    processes: Processes,
    calibration: Calibration | None = None,
    tokenizer: Any | None = None,
) -> Run:
    """The run, after all checks of what can be refused before the estimation."""
    config, experts = for_source_file(source, config, options)
    require_own_roles(config)
    config = for_method(config)
    options = check_devices(options, source, processes)
    meter = Meter(reporter if reporter is not None and processes.first else Silent(), place_of(source, options))
    targets = plan_targets(config, options, source)
    if config.target_speedup is not None:
        config.runtime.check()
    for name in filter(names_a_source, config.calibration if calibration is None else ()):
        check_source(name)
    with meter.stage(LOAD):
        loaded = open_within(source, config, options, tokenizer)
    if loaded.fresh is not None:
        _check_reads_files(options, processes)
        meter.reporter.note("the weights stay in their files and are read block by block")
    if loaded.spills:
        meter.reporter.note("the activations of the reconstruction are kept outside the memory of the weights")
    text, vocabulary = calibration if calibration is not None else config.calibration, None
    if config.prunes_vocabulary:
        with meter.stage(PRUNE_VOCABULARY):
            loaded, tokens, vocabulary = prune_vocabulary(loaded, config, text, processes)
    else:
        with meter.stage(READ_TEXT):
            tokens = draw_tokens(loaded, config, text, processes)
    if loaded.fresh is None:
        with tokens.images(loaded.model):
            check_runs(loaded.model, tokens.longest(loaded.model))
    with meter.stage(DISCOVER):
        graph = _discovered(loaded, config)
        if experts is not None:
            check_layers(experts, graph)
        space = search_space(loaded.model, graph, config)
        files = experts if vocabulary is not None else experts or folder_experts(loaded, graph, config, options)
        targets = reachable_targets(targets, config, loaded, graph, space, files)
    for note in notes(loaded, files):
        meter.reporter.note(note)
    if config.target_speedup is not None:
        with meter.stage(TIME_DECODING):
            timed = processes.broadcast_result(
                lambda: budget_for_speed(loaded.model, graph, space, config, meter.reporter)
            )
            check_reachable(graph, timed, space)
            targets = [dataclasses.replace(target, budget=timed) for target in targets]
    work = WorkFolder.shared(work_path(options), processes)
    run = Run(
        config, options, loaded, graph, space, tokens, work, meter, processes, targets, experts=files,
        vocabulary=vocabulary,
    )  # fmt: skip
    return with_measurements(run)


def reachable_targets(
    targets: Sequence[Target], config: PruneConfig, loaded: LoadedModel, graph: ModelGraph, space: SearchSpace,
    experts: Experts | None,
) -> list[Target]:  # fmt: skip
    """The targets with budgets or the given plan. Raises SaapError for what cannot be reached.

    experts: of the files that the result is made from. The model of `loaded` needs no weights.
    """
    if experts is None or config.target_bytes is None:
        targets = with_budgets(targets, config, graph, loaded.dtype)
    else:
        budget = file_budget(experts, graph, config.target_bytes)
        targets = [dataclasses.replace(target, budget=budget) for target in targets]
    for target in targets:
        check_reachable(graph, target.budget, space)
    if config.plan is None:
        return targets
    given = read_given_plan(config.plan, config, loaded.model, graph, experts)
    if loaded.fresh is not None:
        _check_part_by_part(config.plan, given, config, graph)
    return [dataclasses.replace(targets[0], plan=given)]


def _check_part_by_part(path: Path, given: PlanDocument, config: PruneConfig, graph: ModelGraph) -> None:
    """Raise PlanError for a plan that cannot be carried out block by block."""
    kept = {name: one if isinstance(one, int) else len(one) for name, one in given.keep(graph).items()}
    shared = [one.name for one in graph.groups if one.layer < 0 and kept.get(one.name, one.units) < one.units]
    blocks = ["whole blocks before a reconstruction"] if given.dropped_blocks and config.restore else []
    if removed := blocks + shared:
        raise PlanError(
            f"{path} removes {listed(removed, 4)}, for which the whole model has to be in memory", "Allow more memory"
        )


def _check_reads_files(options: RunOptions, processes: Processes) -> None:
    """Raise ConfigurationError for a run that cannot be made with weights in files."""
    if options.out is None:
        raise _needs_folder()
    if processes.count > 1:
        raise ConfigurationError(
            "Weights that stay in their files are read by one process",
            "Start it without torchrun, or leave out --max-memory",
        )


def _needs_folder() -> ConfigurationError:
    return ConfigurationError("A run of limited memory needs a folder for its result", "Name it with -o DIR")


def _discovered(loaded: LoadedModel, config: PruneConfig) -> ModelGraph:
    """The graph of a model that can be walked block by block and that the method can score."""
    skeleton = loaded.model if loaded.skeleton is None else loaded.skeleton
    graph = discover(skeleton, loaded.ref, finer_heads=PrunableRole.QUERY in config.roles)
    require_whole_blocks(loaded.model, graph.blocks)
    check_walk(loaded.model, graph.blocks)
    if PrunableRole.BLOCK in config.roles:
        check_block_removal(skeleton, graph.blocks)
    check_method(config, graph)
    if config.merge_experts:
        require_mergeable(Backend(loaded.model, graph))
    return graph


def _settings_digest(run: Run) -> str:
    config, tokens = run.config, run.tokens
    sets = [tokens.scored.digest, tokens.held.digest, tokens.refit.digest]
    plan = "" if config.plan is None else config.plan.read_text()
    same: list[Any] = [__version__, config.model_dump(mode="json"), run.graph.digest, str(run.loaded.dtype), sets, plan]
    if run.experts is not None:
        same.append("experts of the model's files")
    if run.vocabulary is not None:
        same.append(list(run.vocabulary.map.old_ids))
    return digest_of(same if run.loaded.fresh is None else [*same, "weights in files"])


def _check_disk(run: Run) -> None:
    """Raise OutputError if the disks cannot hold what is to lie there: results, changed blocks, spilled activations.

    What an interrupted run has left counts as written, except its spilled activations, which are deleted.
    """
    shutil.rmtree(run.work.file("spill"), ignore_errors=True)
    if run.options.out is None:
        return
    targets = [target for target in run.targets if finished_report(run.work, target) is None]
    if run.experts is not None:
        results = [source_bytes(run.experts, run.graph)] * len(targets)
    else:
        plans = [trial_plan(run.graph, target, run.space) for target in targets]
        results = [int(DISK_SPARE * plan.parameters * run.loaded.dtype.itemsize) for plan in plans]
    others = _spilled_bytes(run) + (max(results, default=0) if run.loaded.fresh is not None else 0)
    written = sum(file.stat().st_size for file in run.work.path.rglob("*") if file.is_file())
    check_space(run.options, results, others - written, run.work.file("results"))


def _spilled_bytes(run: Run) -> int:
    """Bytes of the activations that are kept in the work folder."""
    spill = restoration_spill(run.loaded, run.config, run.work.file("spill"))
    if spill is None or spill.folder is None:
        return 0
    sizes = Sizes.of(run.loaded.model, run.device)
    needed = sizes.captured_activations(run.config)
    if run.loaded.fresh is not None:
        scored = 4 * run.tokens.scored.tokens.size * sizes.width * (sizes.blocks + 2)
        recorded = 12 * run.tokens.refit.tokens.size * sizes.width if run.config.restore else 0  # three streams
        needed = max(needed + recorded, scored)
    return needed
