"""What a run will take on this machine, from short trials of its own stages; and whether that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from saap.core.errors import TargetError
from saap.core.manifest import StageRecord
from saap.core.records import StructurePlan
from saap.data.generated import random_starts, sample_from_model
from saap.evaluation.perplexity import perplexity
from saap.models.loading.devices import quick_float32_products, quick_products
from saap.models.walk.consumers import sole_consumers
from saap.models.walk.spill import Spill
from saap.pipeline.prune.planning import estimated, token_scores, unit_costs
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.inputs import (
    GENERATION_BATCH,
    chooses_units,
    finds_costs,
    generated_sequences,
    needs_measuring,
    text_of_costs,
    weighs_tokens,
)
from saap.pipeline.shared.memory import Sizes, gradients, restoration_spill
from saap.pipeline.shared.outcome import greedy_answer
from saap.pipeline.shared.stages import (
    ESTIMATE,
    FIND_COSTS,
    MEASURE,
    MEASURE_DENSE,
    SEARCH,
    TIME_RESULT,
    WEIGH_TOKENS,
    WRITE_TEXT,
    Stage,
    making,
)
from saap.pipeline.shared.targets import Target
from saap.settings.prune import SkipLayers
from saap.settings.registry import Method
from saap.structure_search.budget import Budget
from saap.structure_search.plan import check_reachable
from saap.surgery.refit import RestoreSettings
from saap.surgery.restore import restore

PROBED_SAMPLES = 4
PROBED_TOKENS = 2048
PROBED_REFIT_TOKENS = 8192
PROBED_BLOCKS = 2
"""Of the restoration. Only after the first one are there two residual streams, the dense and the pruned."""
PROBED_STEPS = 24
PROBED_COST_BATCHES = 2
"""Of the walk for second-order costs, the first of which is slower than the others."""
_STATISTICS_BYTES = 5 * 8


@dataclass(frozen=True, slots=True, kw_only=True)
class StageForecast:
    """What a stage will take. seconds: None where no short trial tells. disk_bytes: that it leaves on the disk.

    peak_device_bytes: of an accelerator.
    """

    name: str
    seconds: float | None
    peak_resident_bytes: int
    disk_bytes: int = 0
    peak_device_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """All stages in order. refit_tokens: of the restoration, each of which adds `bytes_per_refit_token` to its peak."""

    stages: tuple[StageForecast, ...]
    refit_tokens: int
    bytes_per_refit_token: float

    @property
    def seconds(self) -> float:
        """Of all stages that could be forecast."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def peak_resident_bytes(self) -> int:
        """Of the stage that needs most."""
        return max(stage.peak_resident_bytes for stage in self.stages)

    @property
    def peak_device_bytes(self) -> int:
        """Of the stage that needs most of an accelerator."""
        return max(stage.peak_device_bytes for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        """Of everything that is written."""
        return sum(stage.disk_bytes for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "seconds": self.seconds,
            "peak_resident_bytes": self.peak_resident_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "disk_bytes": self.disk_bytes,
        }


@dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes that lie in the memory of the process, and on an accelerator."""

    resident: int
    device: int = 0

    @classmethod
    def of(cls, stage: StageRecord) -> Peak:
        """Of a stage that has run."""
        return cls(stage.peak_resident_bytes, stage.peak_device_bytes)

    def plus(self, weights: int, device: torch.device) -> Peak:
        """With further weights where the model lies."""
        if device.type == "cpu":
            return Peak(self.resident + weights, self.device)
        return Peak(self.resident, self.device + weights)


def _stage(stage: Stage, seconds: float | None, peak: Peak, disk_bytes: int = 0, detail: str = "") -> StageForecast:
    return StageForecast(
        name=stage.title + (f" ({detail})" if detail else ""), seconds=seconds, peak_resident_bytes=peak.resident,
        disk_bytes=disk_bytes, peak_device_bytes=peak.device,
    )  # fmt: skip


class _EnoughError(Exception):
    """Ends a trial after its first blocks."""


def forecast(run: Run, targets: Sequence[Target], done: Sequence[StageRecord]) -> Forecast:
    """Try a part of each stage on the run's model, which is of no use afterwards, and scale it to the whole.

    done: the stages so far.
    """
    config, graph = run.config, run.graph
    with quick_float32_products():
        reading, answering = _reading(run)
        measuring = reading.seconds * run.tokens.evaluation.size + answering
        stages = [
            *(StageForecast(**one.model_dump()) for one in done),
            _stage(MEASURE_DENSE, measuring, reading.peak),
            *_writing(run),
            _estimation(run, reading),
        ]
        base = _least(done, reading)
        if finds_costs(config, run.loaded.model, graph):
            stages.append(_costs(run))
        candidates = config.effort_settings.search_evaluations + 1 if needs_measuring(config) else 0
        seconds = candidates * run.tokens.held.tokens.size * reading.seconds
        weighing = [_token_scores(run)] if weighs_tokens(config) else []
        restoring, peak, per_token = _restoration(run, targets, base)
        needed_again = len(targets) > 1 or config.target_speedup is not None  # so the dense model stays whole
        copies = _float_bytes(graph.parameters, run) if needed_again else 0
        for target in targets:
            stages.append(_stage(SEARCH, seconds, reading.peak, detail=target.name if len(targets) > 1 else ""))
        stages += weighing
        for target in targets:
            left = _left(run, target)
            written = left * run.loaded.dtype.itemsize
            stages.append(_stage(making(config.restore), restoring, peak.plus(copies, run.device), written))
            mapped = _float_bytes(left, run) + written if run.device.type == "cpu" else 0  # of the file
            opened = reading.peak.plus(copies + mapped, run.device)
            stages.append(_stage(MEASURE, measuring, opened))
            if config.target_speedup is not None:
                stages.append(_stage(TIME_RESULT, None, opened))
    needed = config.effort_settings
    return Forecast(
        stages=tuple(stages), refit_tokens=needed.refit_sequences * needed.refit_length, bytes_per_refit_token=per_token
    )


@dataclass(frozen=True, slots=True)
class _Rate:
    """Seconds for one token of a forward pass, and the peak while it runs."""

    seconds: float
    peak: Peak


def _reading(run: Run) -> tuple[_Rate, float]:
    """The forward pass, and the seconds of a short greedy answer."""
    tokens = run.tokens.evaluation[:PROBED_TOKENS]
    perplexity(run.loaded.model, tokens[:512], leading=run.tokens.leading)  # the first pass is slower than all others
    with run.meter.stage("try: read"):
        perplexity(run.loaded.model, tokens, leading=run.tokens.leading)
    read = run.meter.stages[-1]
    with run.meter.stage("try: answer"):
        greedy_answer(run.loaded.model, run.loaded.tokenizer)
    return _Rate(read.seconds / len(tokens), Peak.of(read)), run.meter.stages[-1].seconds


def _writing(run: Run) -> list[StageForecast]:
    """The text that the model writes itself, from a few of its steps."""
    wanted = generated_sequences(run.loaded, run.config)
    if not wanted:
        return []
    batch, seed = min(wanted, GENERATION_BATCH), run.config.seed
    starts = random_starts(run.loaded.tokenizer, sequences=batch, seed=seed, leading=run.tokens.leading)
    with run.meter.stage("try: write text"):
        sample_from_model(run.loaded.model, sequences=batch, length=PROBED_STEPS, batch=batch, seed=seed, starts=starts)
    tried = run.meter.stages[-1]
    steps = run.config.effort_settings.refit_length * -(-wanted // batch)
    return [_stage(WRITE_TEXT, tried.seconds / PROBED_STEPS * steps, Peak.of(tried))]


def _estimation(run: Run, reading: _Rate) -> StageForecast:
    scored = run.tokens.scored
    if run.config.method is not Method.SAAP:
        kept = gradients(Sizes.of(run.loaded.model, run.device).values, run.config)
        return _stage(ESTIMATE, None, reading.peak.plus(kept, run.device))
    few = dataclasses.replace(scored, tokens=scored.tokens[:PROBED_SAMPLES], inputs=scored.inputs[:PROBED_SAMPLES])
    with run.meter.stage("try: estimate"):
        estimated(run, few)
    tried = run.meter.stages[-1]
    seconds = tried.seconds / len(few.tokens) * len(scored.tokens)
    units = sum(group.units for group in run.graph.groups)
    return _stage(ESTIMATE, seconds, Peak.of(tried), units * _STATISTICS_BYTES)


@dataclass(slots=True)
class _Trial:
    """A walk over the first micro-batches of the text of costs, and as many steps after it as `after` says.

    batches: of the whole walk. times: when each step ended, the first being the start.
    """

    tokens: torch.Tensor
    rows: int
    batches: int
    after: int = 0
    times: list[float] = field(default_factory=lambda: [perf_counter()])

    @classmethod
    def of(cls, run: Run, after: int = 0) -> _Trial:
        """On the text that the run will take."""
        tokens, rows = text_of_costs(run.tokens, run.device)
        return cls(tokens[: PROBED_COST_BATCHES * rows], rows, -(-len(tokens) // rows), after)

    @property
    def walked(self) -> int:
        """Micro-batches of the trial."""
        return min(PROBED_COST_BATCHES, self.batches)

    def step(self, done: int, total: int) -> None:
        """A step has ended."""
        self.times.append(perf_counter())
        if self.after and done == self.walked + self.after:
            raise _EnoughError

    @property
    def walking(self) -> float:
        """Seconds of the whole walk by its last micro-batch, since the first is slower than the others."""
        return (self.times[self.walked] - self.times[self.walked - 1]) * self.batches


def _costs(run: Run) -> StageForecast:
    """Second-order costs: the walk over a few micro-batches, and the order of the units of one block."""
    modules = list(sole_consumers(run.graph).values())
    ordered = sum(group.layer == modules[0].layer for group in modules)
    with run.meter.stage("try: find costs"), suppress(_EnoughError), run.tokens.images(run.loaded.model):
        trial = _Trial.of(run, ordered)
        unit_costs(run, trial.tokens, trial.rows, trial.step)
    ordering = trial.times[trial.walked + ordered] - trial.times[trial.walked]
    seconds = trial.walking + ordering * len(modules) / max(1, ordered)  # there may be none that is measurable
    return _stage(FIND_COSTS, seconds, Peak.of(run.meter.stages[-1]))


def _token_scores(run: Run) -> StageForecast:
    """Scores token by token: the walk over a few micro-batches."""
    with run.meter.stage("try: weigh tokens"), run.tokens.images(run.loaded.model):
        trial = _Trial.of(run)
        token_scores(run, trial.tokens, trial.rows, trial.step)
    return _stage(WEIGH_TOKENS, trial.walking, Peak.of(run.meter.stages[-1]))


def _restoration(run: Run, targets: Sequence[Target], base: Peak) -> tuple[float, Peak, float]:
    """The first blocks of the restoration, with as many of its tokens as a short trial may have; spoils the model.

    Returns its seconds, its peak, and the bytes of the resident peak for each token. base: without it.
    """
    if not run.config.restore:
        return 0.0, base, 0.0
    tokens = run.tokens.tensor("refit", run.device)
    tokens = tokens[: max(2, min(len(tokens), PROBED_REFIT_TOKENS // tokens.shape[1]))]
    needed = run.config.effort_settings
    blocks = len(run.graph.blocks)
    probed = min(PROBED_BLOCKS, blocks)

    def stop(done: int, total: int) -> None:
        if done == probed:
            raise _EnoughError

    settings = RestoreSettings(second_order=needed.second_order and chooses_units(run.config))
    spill = restoration_spill(run.loaded, run.config, run.work.file("spill"))
    with run.meter.stage("try: restore"), suppress(_EnoughError), run.tokens.images(run.loaded.model):
        products = quick_products(run.device, run.loaded.dtype)
        backend = dataclasses.replace(run.backend, spill=spill, products=products, progress=stop)
        restore(backend, _even_plan(run, targets), tokens, settings)
    tried = Peak.of(run.meter.stages[-1])
    scale = needed.refit_sequences * needed.refit_length / tokens.numel()
    # what is kept elsewhere grows with the tokens there: in the host's memory, or on the disk
    grows = Peak(tried.resident - base.resident, tried.device - base.device)
    resident = base.resident + int(max(0, grows.resident) * (1 if isinstance(spill, Spill) else scale))
    device = base.device + int(max(0, grows.device) * (1 if spill is not None else scale))
    seconds = run.meter.stages[-1].seconds / probed * blocks * scale
    return seconds, Peak(resident, device), max(0, grows.resident) / tokens.numel()


def _even_plan(run: Run, targets: Sequence[Target]) -> StructurePlan:
    """A plan in which the first block gives its share as well, as most blocks do."""
    space = dataclasses.replace(run.space, skip_layers=SkipLayers())
    budget = next((target.budget for target in targets if target.budget is not None), Budget(removal=0))
    try:
        return check_reachable(run.graph, budget, space)
    except TargetError:
        return check_reachable(run.graph, Budget(removal=0), space)


def _left(run: Run, target: Target) -> int:
    if target.budget is None:
        return run.graph.parameters
    return check_reachable(run.graph, target.budget, run.space).parameters


def _float_bytes(parameters: int, run: Run) -> int:
    return parameters * next(run.loaded.model.parameters()).element_size()


def _least(done: Sequence[StageRecord], reading: _Rate) -> Peak:
    """Bytes that stay while the model lies in memory: no stage can have a lower peak."""
    peaks = [reading.peak, *(Peak.of(stage) for stage in done[1:])]
    return Peak(min(peak.resident for peak in peaks), min(peak.device for peak in peaks))
