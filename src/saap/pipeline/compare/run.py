"""`saap compare`: several methods at several ratios, from one model, one calibration and one set of measurements."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn

from saap.core.errors import CalibrationError, ConfigurationError
from saap.core.evaluation_records import COMPARISON, Comparison, ComparisonRow, DenseRow, StageSeconds
from saap.core.manifest import recorded_versions, typed_command
from saap.core.records import ImportanceScores, IntArray, ModelGraph, StructurePlan
from saap.core.storage import write_whole
from saap.data.pairs import pairs_file
from saap.discovery import discover
from saap.evaluation.bootstrap import kept_accuracy
from saap.models.loading.devices import copied, quick_float32_products
from saap.models.walk.probe import check_runs, trial_ids
from saap.models.walk.processes import Processes
from saap.pipeline.compare.rows import RowStore, file_name
from saap.pipeline.evaluate.run import ask_tasks, check_request, read_streams, requested_perplexity
from saap.pipeline.prune.baselines import baseline_of, check_method, for_method, measurements, require_own_roles
from saap.pipeline.prune.making import cut_and_restore
from saap.pipeline.prune.steps import carry_out
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.inputs import LoadedModel, RunOptions, open_model, place_of, resolve_with_tokenizer
from saap.pipeline.shared.legality import check_walk, search_space
from saap.pipeline.shared.meter import Meter
from saap.pipeline.shared.progress import Reporter, Silent
from saap.pipeline.shared.stages import DISCOVER, LOAD, MEASURE_DENSE, READ_TEXT
from saap.pipeline.shared.targets import Target, with_budgets
from saap.pipeline.shared.tokens import TokenSets, draw_tokens, sample_length
from saap.pipeline.shared.work import WorkFolder
from saap.settings.compare import CompareRequest
from saap.settings.prune import MethodChoice, PrunableRole, PruneConfig
from saap.settings.registry import Method
from saap.structure_search.plan import check_reachable

LARGEST_RATIO = 1e100
"""Ratios of perplexities at or above this limit are undefined, like those of infinite perplexities."""


def compare(
    source: str | Path, request: CompareRequest, options: RunOptions, out: Path, reporter: Reporter | None = None
) -> Comparison:
    """Prune with every method, ratio, seed and reconstruction, measure each, and write it all to `out`.

    Finished rows are kept when the same comparison runs again. Finished rows of other methods, ratios and seeds in
    `out` are part of the result too. Returns the content of `comparison.json`. Raises SaapError for invalid requests,
    and if another run is at work in `out`, before anything is measured.
    """
    meter = Meter(reporter if reporter is not None else Silent(), place_of(source, options))
    _check(request)
    configs = [_config(request, choice, request.seeds[0]) for choice in request.methods]
    opened, tokenizer = resolve_with_tokenizer(source, options, None)
    streams = read_streams(request.evaluation, tokenizer)
    with meter.stage(LOAD):
        loaded = open_model(opened, options, tokenizer)
    with meter.stage(DISCOVER):
        check_runs(
            loaded.model,
            trial_ids(loaded.model, max(request.evaluation.window, sample_length(loaded.model, request.config))),
        )
        finer_heads = any(PrunableRole.QUERY in config.roles for config in configs)
        graph = discover(loaded.model, loaded.ref, finer_heads=finer_heads)
        check_walk(loaded.model, graph.blocks)
        for config in configs:
            check_method(config, graph)
            for target in _targets(config, graph, loaded):
                check_reachable(graph, target.budget, search_space(loaded.model, graph, config))
    rows = RowStore(out, request)
    rows.open(graph)
    with WorkFolder(out).alone(Processes()):
        with meter.stage(READ_TEXT):
            tokens = {seed: _tokens(loaded, request, seed) for seed in request.seeds if rows.lacking(seed)}
        return _compared(_Bench(loaded, graph, request, streams, tokens, meter, rows), options)


def _compared(bench: _Bench, options: RunOptions) -> Comparison:
    """Measure what is missing, and write the comparison."""
    request, out = bench.request, bench.rows.folder
    with quick_float32_products():
        dense = bench.dense_row()
        for seed in request.seeds:
            bench.make_rows(seed, options, dense)
        result = Comparison(
            model=bench.loaded.ref.source, dense=dense, rows=bench.rows.finished(), command=typed_command(),
            settings=request.config.model_dump(mode="json"), versions=recorded_versions(),
        )  # fmt: skip
        write_whole(out / COMPARISON, (result.model_dump_json(indent=1) + "\n").encode())
        shutil.rmtree(out / "work", ignore_errors=True)
    return result


def _check(request: CompareRequest) -> None:
    check_request(request.evaluation)
    strange = [ratio for ratio in request.task_ratios or () if ratio not in request.config.pruning_ratios]
    if strange:
        raise ConfigurationError(
            f"--task-ratios has {strange[0]:g}, which is not compared", "Use some of --pruning-ratio, or none"
        )
    if not request.evaluation.texts:
        raise ConfigurationError("no text to measure perplexity on was given", "Give --perplexity NAME|FILE")


def _config(request: CompareRequest, choice: MethodChoice, seed: int) -> PruneConfig:
    """The settings of one method. Raises ConfigurationError for roles of its own that it does not have."""
    changes = {"method": choice.method, "roles": choice.roles or request.config.roles, "seed": seed, "restore": False}
    config = request.config.model_copy(update=changes)
    if choice.roles is not None:
        require_own_roles(config)
    return for_method(config)


def _tokens(loaded: LoadedModel, request: CompareRequest, seed: int) -> TokenSets:
    """The calibration of one seed, which every method gets. Raises CalibrationError."""
    config = request.config.model_copy(update={"seed": seed, "restore": True})
    baselines = [choice.label for choice in request.methods if choice.method is not Method.SAAP]
    if baselines and pairs_file(config.calibration) is not None:
        raise CalibrationError(f"--methods {baselines[0]} does not support image-text pairs", "Give a text file")
    return draw_tokens(loaded, config, config.calibration)


def _targets(config: PruneConfig, graph: ModelGraph, loaded: LoadedModel) -> list[Target]:
    named = [Target(f"{ratio:g}", None, None) for ratio in config.pruning_ratios]
    return with_budgets(named, config, graph, loaded.dtype)


@dataclass(frozen=True, slots=True)
class _Bench:
    """The dense model, and the measurements of every model."""

    loaded: LoadedModel
    graph: ModelGraph
    request: CompareRequest
    streams: Mapping[str, IntArray]
    tokens: Mapping[int, TokenSets]
    meter: Meter
    rows: RowStore

    def dense_row(self) -> DenseRow:
        """The row of the dense model, measured unless it exists."""
        row = self.rows.dense()
        if row is not None and (row.tasks or not self.request.evaluation.tasks):
            return row
        with self.meter.stage(MEASURE_DENSE):
            found = self._measured(self.loaded.model, with_tasks=True)
        return self.rows.write_dense(DenseRow(**found, block_parameters=self.graph.block_parameters))

    def make_rows(self, seed: int, options: RunOptions, dense: DenseRow) -> None:
        """Make the missing rows of one seed."""
        lacking = self.rows.lacking(seed)
        if not lacking:
            return
        shared, seconds = self._share(seed, options), dict[str, float]()
        left = list(dict.fromkeys(choice for choice, *_ in lacking))
        for choice, group in groupby(lacking.items(), key=lambda row: row[0][0]):
            run, scores, scoring = self._score(shared, choice, seconds)
            here = [(ratio, restored, path) for (_, ratio, restored), path in group]
            plans, searching = self._plans(run, scores, tuple(dict.fromkeys(ratio for ratio, *_ in here)))
            spent = StageSeconds(score=scoring, search=searching, make=0.0)
            for ratio, restored, path in here:
                one = dataclasses.replace(run, config=run.config.model_copy(update={"restore": restored}))
                self.rows.write(path, self._make_row(choice.label, one, scores, ratio, plans[ratio], spent, dense))
            left.remove(choice)
            measurements(shared).keep_only(baseline_of(one.method) for one in left)

    def _share(self, seed: int, options: RunOptions) -> Run:
        """The calibration of one seed and the baselines' measurements with it, the same for every method."""
        config = self.request.config.model_copy(update={"seed": seed, "restore": True})
        work = WorkFolder(self.rows.folder / "work" / f"{self.graph.digest[:12]}-seed-{seed}")
        space = search_space(self.loaded.model, self.graph, config)
        run = Run(config, options, self.loaded, self.graph, space, self.tokens[seed], work, self.meter)
        return dataclasses.replace(run, measurements=measurements(run))

    def _score(
        self, shared: Run, choice: MethodChoice, shared_seconds: dict[str, float]
    ) -> tuple[Run, ImportanceScores | None, float]:
        """The run of one method, its scores if they decide anything, and their seconds with the shared passes.

        shared_seconds: of those passes so far, each made once, by name of the measurement.
        """
        config = _config(self.request, choice, shared.config.seed)
        work = WorkFolder(shared.work.file(file_name(choice.label)))
        space = search_space(self.loaded.model, self.graph, config)
        run = dataclasses.replace(shared, config=config, space=space, work=work)
        baseline = baseline_of(choice.method)
        needs = "" if baseline is None or baseline.measure is None else getattr(baseline.measure, "__name__", "text")
        if baseline is not None and needs and needs not in shared_seconds:
            start = time.perf_counter()
            with self.meter.stage(f"measure the {needs} for the baselines"):
                measurements(run).of(baseline)
            shared_seconds[needs] = time.perf_counter() - start
        start = time.perf_counter()
        with self.meter.stage(f"{choice.label}: score"):
            scores = carry_out(run, ("scores",)).get(("scores", ""))
        return run, scores, time.perf_counter() - start + shared_seconds.get(needs, 0.0)

    def _plans(
        self, run: Run, scores: ImportanceScores | None, ratios: tuple[float, ...]
    ) -> tuple[dict[float, StructurePlan], float]:
        """The plan of each ratio, whether reconstructed or only cut, and the seconds that each took."""
        targets = _targets(run.config.model_copy(update={"pruning_ratios": ratios}), self.graph, self.loaded)
        start = time.perf_counter()
        found = carry_out(dataclasses.replace(run, targets=targets), ("plan",), {"scores": scores})
        seconds = (time.perf_counter() - start) / len(targets)
        return {ratio: found["plan", target.name] for ratio, target in zip(ratios, targets, strict=True)}, seconds

    def _make_row(
        self, label: str, run: Run, scores: ImportanceScores | None, ratio: float, plan: StructurePlan,
        spent: StageSeconds, dense: DenseRow,
    ) -> ComparisonRow:  # fmt: skip
        """Make and measure the model of a plan. spent: seconds on the scores and the search."""
        start, before, restored = time.perf_counter(), len(self.meter.stages), run.config.restore
        shown = f"{label}, {ratio:g}{', reconstructed' if restored else ''}"
        model = copied(self.loaded.model)
        with self.meter.stage(f"{shown}: make"):
            made, _ = cut_and_restore(run, model, plan, scores)
        seconds = spent.model_copy(update={"make": time.perf_counter() - start})
        with self.meter.stage(f"{shown}: measure"):
            found = self._measured(model, self.request.asks_tasks(ratio))
        quotients = {text: one.value / dense.perplexity[text].value for text, one in found["perplexity"].items()}
        return ComparisonRow(
            **found, method=label, ratio=ratio, seed=run.config.seed, restored=restored, seconds=seconds,
            pruning_ratio=1 - made.block_parameters / self.graph.block_parameters,
            ratios={text: value if 0 < value < LARGEST_RATIO else None for text, value in quotients.items()},
            kept_accuracy=kept_accuracy(dense.tasks, found["tasks"]) if found["tasks"] else None,
            peak_resident_bytes=max(stage.peak_resident_bytes for stage in self.meter.stages[before:]),
        )  # fmt: skip

    def _measured(self, model: nn.Module, with_tasks: bool) -> dict[str, Any]:
        """Size, perplexities, tokens per second over the first text, and tasks of a model."""
        evaluation, tokenizer = self.request.evaluation, self.loaded.tokenizer
        texts: dict[str, Any] = {}
        speed = None
        for name, ids in self.streams.items():
            start = time.perf_counter()
            texts[name] = requested_perplexity(model, tokenizer, evaluation, ids)
            speed = speed or texts[name].tokens / (time.perf_counter() - start)
        requested = evaluation.tasks and with_tasks
        tasks = ask_tasks(model, tokenizer, evaluation, self.meter.reporter) if requested else {}
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return {"parameters": parameters, "perplexity": texts, "tasks": tasks, "tokens_per_second": speed}
