"""`saap compare`: several methods at several ratios, from one model, one calibration and one set of measurements."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from saap.baselines.methods import BASELINES, Measurements
from saap.core.errors import ConfigurationError
from saap.core.manifest import recorded_versions, typed_command
from saap.core.records import ImportanceScores, IntArray, ModelGraph, StructurePlan
from saap.core.storage import write_whole
from saap.discovery import discover
from saap.evaluation.bootstrap import kept_accuracy
from saap.evaluation.zero_shot import TaskResult
from saap.models.loading.devices import copied, quick_float32_products
from saap.models.loading.pretrained import load_tokenizer
from saap.models.loading.references import resolve_model
from saap.models.walk.probe import check_runs, trial_ids
from saap.pipeline.compare.rows import RowStore, file_name
from saap.pipeline.evaluate.run import ask_tasks, check_request, finite, read_streams, requested_perplexity
from saap.pipeline.prune.baselines import for_method, measurements
from saap.pipeline.prune.generated_text import write_text
from saap.pipeline.prune.planning import plans_for, scores_of
from saap.pipeline.prune.run import cut_and_restore
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.inputs import LoadedModel, RunOptions, TokenSets, draw_tokens, open_model, place_of
from saap.pipeline.shared.legality import check_walk, search_space
from saap.pipeline.shared.meter import Meter
from saap.pipeline.shared.progress import Reporter, Silent
from saap.pipeline.shared.stages import DISCOVER, LOAD, MEASURE_DENSE, READ_TEXT, WRITE_TEXT
from saap.pipeline.shared.targets import Target, with_budgets
from saap.pipeline.shared.work import WorkFolder
from saap.reporting.inputs import COMPARISON
from saap.settings.measure import CompareRequest
from saap.settings.prune import MethodChoice, PruneConfig
from saap.structure_search.plan import check_reachable


@dataclass(slots=True)
class _Shared:
    """What all methods of one seed use."""

    run: Run
    found: Measurements
    seconds: dict[str, float] = field(default_factory=dict)

    def measure(self, name: str | None) -> float:
        """Make a pass if nobody has; the seconds it took whoever made it."""
        if name is None:
            return 0.0
        if name not in self.seconds:
            start = time.perf_counter()
            with self.run.meter.stage(f"measure the {name} for the baselines"):
                getattr(self.found, name)
            self.seconds[name] = time.perf_counter() - start
        return self.seconds[name]


@dataclass(frozen=True, slots=True)
class _Bench:
    """The dense model, and what is measured on everything."""

    loaded: LoadedModel
    graph: ModelGraph
    request: CompareRequest
    streams: Mapping[str, IntArray]
    meter: Meter
    rows: RowStore


def compare(
    source: str | Path | nn.Module,
    request: CompareRequest,
    options: RunOptions,
    out: Path,
    reporter: Reporter | None = None,
    *,
    tokenizer: Any | None = None,
) -> dict[str, Any]:
    """Prune with every method, ratio, seed and restoration, measure each, and write it all to `out`.

    A row that is finished is not made again when the same comparison is started once more; finished rows of other
    methods, ratios and seeds that lie in `out` belong to the result too. Returns the content of `comparison.json`.
    Raises SaapError for everything that can be refused, before anything is measured.
    """
    meter = Meter(reporter if reporter is not None else Silent(), place_of(source, options))
    _check(request)
    if not isinstance(source, nn.Module):
        resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(resolved)
    streams = read_streams(request.evaluation, tokenizer)
    with meter.stage(LOAD):
        loaded = open_model(source, options, tokenizer)
    with meter.stage(DISCOVER):
        check_runs(loaded.model, trial_ids(loaded.model, max(request.evaluation.window, request.config.sample_length)))
        graph = discover(loaded.model, loaded.ref)
        check_walk(loaded.model, graph.blocks)
        for choice in request.methods:
            run_config = _config(request, choice, request.seeds[0])
            for target in _targets(run_config, graph, loaded):
                if target.budget is not None:
                    check_reachable(graph, target.budget, search_space(loaded.model, graph, run_config))
    rows = RowStore(out, request)
    rows.open(graph)
    bench = _Bench(loaded, graph, request, streams, meter, rows)
    with quick_float32_products():
        dense = _dense_row(bench)
        for seed in request.seeds:
            _rows_of_seed(bench, seed, options, dense)
    result = {
        "model": loaded.ref.source,
        "dense": dense,
        "rows": rows.finished(),
        "command": list(typed_command()),
        "settings": finite(request.config.model_dump(mode="json")),
        "versions": recorded_versions(),
    }
    write_whole(out / COMPARISON, (json.dumps(result, indent=1) + "\n").encode())
    shutil.rmtree(out / "work", ignore_errors=True)
    return result


def _check(request: CompareRequest) -> None:
    check_request(request.evaluation)
    if not request.methods or not request.seeds or not request.restorations:
        raise ConfigurationError("nothing to compare was named", "Name methods, ratios and seeds")
    strange = [ratio for ratio in request.task_ratios or () if ratio not in request.config.pruning_ratios]
    if strange:
        raise ConfigurationError(
            f"--task-ratios names {strange[0]:g}, which is not compared", "Name some of --pruning-ratio, or none"
        )
    if not request.evaluation.texts:
        raise ConfigurationError("no text to measure perplexity on was named", "Give --perplexity NAME|FILE")


def _config(request: CompareRequest, choice: MethodChoice, seed: int) -> PruneConfig:
    roles = choice.roles or request.config.roles
    return for_method(
        request.config.model_copy(update={"method": choice.method, "roles": roles, "seed": seed, "restore": False})
    )


def _targets(config: PruneConfig, graph: ModelGraph, loaded: LoadedModel) -> list[Target]:
    named = [Target(f"{ratio:g}", None, None) for ratio in config.pruning_ratios]
    return with_budgets(named, config, graph, loaded.dtype)


def _rows_of_seed(bench: _Bench, seed: int, options: RunOptions, dense: dict[str, Any]) -> None:
    """Make the rows of one seed that are not there."""
    lacking = bench.rows.lacking(seed)
    if not lacking:
        return
    shared = _share(bench, seed, options)
    for choice in bench.request.methods:
        here = {key: path for key, path in lacking.items() if key[0] == choice}
        if here:
            scored = _score(bench, shared, choice)
            for restored in dict.fromkeys(restored for _, _, restored in here):
                alike = {ratio: path for (_, ratio, kind), path in here.items() if kind is restored}
                _make_rows(bench, scored.restoring(restored), alike, dense)


def _share(bench: _Bench, seed: int, options: RunOptions) -> _Shared:
    """The calibration of one seed, the same for every method."""
    config = bench.request.config.model_copy(update={"seed": seed, "restore": True})
    with bench.meter.stage(READ_TEXT):
        tokens: TokenSets = draw_tokens(bench.loaded, config, config.calibration)
    work = WorkFolder(bench.rows.folder / "work" / f"seed-{seed}")
    work.path.mkdir(parents=True, exist_ok=True)
    space = search_space(bench.loaded.model, bench.graph, config)
    run = Run(config, options, bench.loaded, bench.graph, space, tokens, work, bench.meter)
    write_text(run)
    return _Shared(run, measurements(run))


@dataclass(frozen=True, slots=True)
class _Scored:
    """A run of one method, whose units are scored. seconds: that this took, with passes that methods share."""

    choice: MethodChoice
    run: Run
    scores: ImportanceScores
    measured: Measurements | None
    seconds: float

    def restoring(self, restored: bool) -> _Scored:
        """The same for models that are restored, or only cut."""
        config = self.run.config.model_copy(update={"restore": restored})
        return dataclasses.replace(self, run=dataclasses.replace(self.run, config=config))


def _score(bench: _Bench, shared: _Shared, choice: MethodChoice) -> _Scored:
    """Score the units with one method."""
    config = _config(bench.request, choice, shared.run.config.seed)
    work = WorkFolder(shared.run.work.path / file_name(choice.label))
    work.path.mkdir(parents=True, exist_ok=True)
    if shared.run.work.file(WRITE_TEXT.file).exists():
        shutil.copyfile(shared.run.work.file(WRITE_TEXT.file), work.file(WRITE_TEXT.file))
    space = search_space(bench.loaded.model, bench.graph, config)
    run = dataclasses.replace(shared.run, config=config, space=space, work=work)
    baseline = BASELINES.get(choice.method)
    measured = None if baseline is None else shared.found
    seconds = shared.measure(None if baseline is None else baseline.needs)
    start = time.perf_counter()
    with bench.meter.stage(f"{choice.label}: score"):
        scores = scores_of(run, measured)
    return _Scored(choice, run, scores, measured, seconds + time.perf_counter() - start)


def _make_rows(bench: _Bench, scored: _Scored, wanted: Mapping[float, Path], dense: dict[str, Any]) -> None:
    """Plan, make and measure rows that are all restored or all only cut: a search may plan for what comes after it."""
    run = scored.run
    every = zip(run.config.pruning_ratios, _targets(run.config, bench.graph, bench.loaded), strict=True)
    suffix = "-restored" if run.config.restore else ""
    targets = {r: dataclasses.replace(target, name=f"{target.name}{suffix}") for r, target in every if r in wanted}
    start = time.perf_counter()
    plans = dict(zip(targets, plans_for(run, list(targets.values()), scored.scores), strict=True))
    searching = (time.perf_counter() - start) / len(targets)
    for ratio, path in wanted.items():
        bench.rows.write(path, _row(bench, scored, plans[ratio], ratio, searching, dense))


def _row(
    bench: _Bench, scored: _Scored, plan: StructurePlan, ratio: float, searching: float, dense: dict[str, Any]
) -> dict[str, Any]:
    """One pruned model, measured. `seconds`: of the stages; a shared pass counts for each method that uses it.

    `ratios`: perplexity over that of the dense model, by text. `tokens_per_second`: while the first text was read.
    """
    run, label = scored.run, scored.choice.label
    start, before = time.perf_counter(), len(bench.meter.stages)
    shown = f"{label}, {ratio:g}{', restored' if run.config.restore else ''}"
    model = copied(bench.loaded.model)
    with bench.meter.stage(f"{shown}: make"):
        plan, _ = cut_and_restore(run, model, plan, scored.scores, scored.measured)
    seconds = {"score": scored.seconds, "search": searching, "make": time.perf_counter() - start}
    with bench.meter.stage(f"{shown}: measure"):
        found = _measured(bench, model, bench.request.asks_tasks(ratio))
    kept = None
    if found["tasks"]:
        both = ({name: TaskResult(**one) for name, one in tasks.items()} for tasks in (dense["tasks"], found["tasks"]))
        kept = dataclasses.asdict(kept_accuracy(*both))
    return {
        "method": label,
        "ratio": ratio,
        "seed": run.config.seed,
        "restored": run.config.restore,
        "pruning_ratio": 1 - plan.block_parameters / bench.graph.block_parameters,
        **found,
        "ratios": {
            text: one["value"] / dense["perplexity"][text]["value"] for text, one in found["perplexity"].items()
        },
        "kept_accuracy": kept,
        "seconds": seconds,
        "peak_resident_bytes": max(stage.peak_resident_bytes for stage in bench.meter.stages[before:]),
    }


def _dense_row(bench: _Bench) -> dict[str, Any]:
    row = bench.rows.dense()
    if row is not None:
        return row
    with bench.meter.stage(MEASURE_DENSE):
        found = _measured(bench, bench.loaded.model, with_tasks=True)
    sizes = {"parameters": bench.graph.parameters, "block_parameters": bench.graph.block_parameters}
    return bench.rows.write_dense(found | sizes)


def _measured(bench: _Bench, model: nn.Module, with_tasks: bool) -> dict[str, Any]:
    """Size, perplexities, tokens per second over the first text, and tasks of a model."""
    wanted = bench.request.evaluation
    texts: dict[str, Any] = {}
    speed = None
    for name, ids in bench.streams.items():
        start = time.perf_counter()
        found = requested_perplexity(model, bench.loaded.tokenizer, wanted, ids)
        speed = speed or found.tokens / (time.perf_counter() - start)
        texts[name] = dataclasses.asdict(found)
    asked = wanted.tasks and with_tasks
    tasks = ask_tasks(model, bench.loaded.tokenizer, wanted, bench.meter.reporter) if asked else {}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "perplexity": texts,
        "tasks": {name: dataclasses.asdict(one) for name, one in tasks.items()},
        "tokens_per_second": speed,
    }
