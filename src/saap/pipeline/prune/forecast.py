"""What a run will take on this machine, from short trials of its own stages; and whether that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from saap.core.errors import TargetError
from saap.core.records import ModelGraph, Role, StructurePlan
from saap.data.generated import random_starts, sample_from_model
from saap.estimation.calibrate import estimate
from saap.estimation.token_fisher import token_fisher_scores
from saap.evaluation.perplexity import perplexity
from saap.models.loading.devices import quick_float32_products, quick_products
from saap.models.walk.backend import Backend
from saap.models.walk.consumers import sole_consumers
from saap.models.walk.spill import Spill
from saap.pipeline.shared.inputs import (
    GENERATION_BATCH,
    LoadedModel,
    TokenSets,
    chooses_units,
    finds_costs,
    generated_sequences,
    needs_measuring,
    text_of_costs,
    weighs_tokens,
)
from saap.pipeline.shared.memory import Sizes, gradients, restoration_spill
from saap.pipeline.shared.meter import Meter, StageCost
from saap.pipeline.shared.outcome import greedy_answer
from saap.pipeline.shared.targets import Target
from saap.settings.prune import Method, PruneConfig, SkipLayers, unit_roles
from saap.structure_search.costs import second_order_costs
from saap.structure_search.objectives import Budget
from saap.structure_search.plan import SearchSpace, check_reachable
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
    def of(cls, stage: StageCost) -> Peak:
        """Of a stage that has run."""
        return cls(stage.peak_resident_bytes, stage.peak_device_bytes)

    def plus(self, weights: int, device: torch.device) -> Peak:
        """With further weights where the model lies."""
        if device.type == "cpu":
            return Peak(self.resident + weights, self.device)
        return Peak(self.resident, self.device + weights)


def _stage(name: str, seconds: float | None, peak: Peak, disk_bytes: int = 0) -> StageForecast:
    return StageForecast(
        name=name, seconds=seconds, peak_resident_bytes=peak.resident, disk_bytes=disk_bytes,
        peak_device_bytes=peak.device,
    )  # fmt: skip


class _EnoughError(Exception):
    """Ends a trial after its first blocks."""


@dataclass(frozen=True, slots=True)
class Probed:
    """A run that was prepared and whose model may be spoilt by trials. done: costs of the stages so far."""

    config: PruneConfig
    loaded: LoadedModel
    graph: ModelGraph
    space: SearchSpace
    tokens: TokenSets
    targets: Sequence[Target]
    done: Sequence[StageCost]

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.loaded.model.parameters()).device

    @property
    def backend(self) -> Backend:
        """The model, and how the trials run it."""
        return Backend(self.loaded.model, self.graph)


def forecast(run: Probed, meter: Meter) -> Forecast:
    """Try a part of each stage on the model, which is of no use afterwards, and scale it to the whole."""
    config, graph = run.config, run.graph
    with quick_float32_products():
        reading, answering = _reading(run, meter)
        stages = [
            *(_stage(stage.name, stage.seconds, Peak.of(stage)) for stage in run.done),
            _measuring(run, "measure the dense model", reading, answering),
            *_writing(run, meter),
            _estimation(run, meter, reading),
        ]
        base = _least(run.done, reading)
        if finds_costs(config, run.loaded.model, graph):
            stages.append(_costs(run, meter))
        candidates = config.effort_settings.search_evaluations + 1 if needs_measuring(config) else 0
        seconds = candidates * run.tokens.held.tokens.size * reading.seconds
        weighing = [_token_fisher(run, meter)] if weighs_tokens(config) else []
        restoring, peak, per_token = _restoration(run, meter, base)
        needed_again = len(run.targets) > 1 or config.target_speedup is not None  # so the dense model stays whole
        copies = _float_bytes(graph.parameters, run) if needed_again else 0
        for target in run.targets:
            label = f" ({target.name})" if len(run.targets) > 1 else ""
            stages.append(_stage(f"search the structure{label}", seconds, reading.peak))
        stages += weighing
        for target in run.targets:
            left = _left(run, target)
            name = f"cut{' and restore' if config.restore else ''}, block by block"
            written = left * run.loaded.dtype.itemsize
            stages.append(_stage(name, restoring, peak.plus(copies, run.device), written))
            again = _measuring(run, "open the result and measure it", reading, answering)
            mapped = _float_bytes(left, run) + written if run.device.type == "cpu" else 0  # of the file
            opened = reading.peak.plus(copies + mapped, run.device)
            stages.append(_stage(again.name, again.seconds, opened))
            if config.target_speedup is not None:
                stages.append(_stage("measure the speed of the result", None, opened))
    needed = config.effort_settings
    return Forecast(
        stages=tuple(stages), refit_tokens=needed.refit_sequences * needed.refit_length, bytes_per_refit_token=per_token
    )


@dataclass(frozen=True, slots=True)
class _Rate:
    """Seconds for one token of a forward pass, and the peak while it runs."""

    seconds: float
    peak: Peak


def _reading(run: Probed, meter: Meter) -> tuple[_Rate, float]:
    """The forward pass, and the seconds of a short greedy answer."""
    tokens = run.tokens.evaluation[:PROBED_TOKENS]
    perplexity(run.loaded.model, tokens[:512], leading=run.tokens.leading)  # the first pass is slower than all others
    with meter.stage("try: read"):
        perplexity(run.loaded.model, tokens, leading=run.tokens.leading)
    read = meter.stages[-1]
    with meter.stage("try: answer"):
        greedy_answer(run.loaded.model, run.loaded.tokenizer)
    return _Rate(read.seconds / len(tokens), Peak.of(read)), meter.stages[-1].seconds


def _measuring(run: Probed, name: str, reading: _Rate, answering: float) -> StageForecast:
    seconds = reading.seconds * run.tokens.evaluation.size + answering
    return _stage(name, seconds, reading.peak)


def _writing(run: Probed, meter: Meter) -> list[StageForecast]:
    """The text that the model writes itself, from a few of its steps."""
    wanted = generated_sequences(run.loaded, run.config)
    if not wanted:
        return []
    batch = min(wanted, GENERATION_BATCH)
    with meter.stage("try: write text"):
        sample_from_model(
            run.loaded.model, sequences=batch, length=PROBED_STEPS, batch=batch, seed=run.config.seed,
            starts=random_starts(
                run.loaded.tokenizer, sequences=batch, seed=run.config.seed, leading=run.tokens.leading
            ),
        )  # fmt: skip
    tried = meter.stages[-1]
    steps = run.config.effort_settings.refit_length * -(-wanted // batch)
    return [_stage("let the model write text of its own", tried.seconds / PROBED_STEPS * steps, Peak.of(tried))]


def _estimation(run: Probed, meter: Meter, reading: _Rate) -> StageForecast:
    name = "estimate the importance of every unit"
    scored = run.tokens.scored
    units = sum(group.units for group in run.graph.groups)
    if run.config.method is not Method.SAAP:
        kept = gradients(Sizes.of(run.loaded.model, run.device).values, run.config)
        return _stage(name, None, reading.peak.plus(kept, run.device))
    few = dataclasses.replace(scored, tokens=scored.tokens[:PROBED_SAMPLES], inputs=scored.inputs[:PROBED_SAMPLES])
    with meter.stage("try: estimate"), run.tokens.images(run.loaded.model):
        estimate(
            run.backend, few, roles=unit_roles(run.config.roles) or [Role.FFN, Role.ATTENTION],
            element_order=run.config.element_score, aggregation=run.config.aggregation,
        )  # fmt: skip
    tried = meter.stages[-1]
    seconds = tried.seconds / len(few.tokens) * len(scored.tokens)
    return _stage(name, seconds, Peak.of(tried), units * _STATISTICS_BYTES)


def _costs(run: Probed, meter: Meter) -> StageForecast:
    """Second-order costs: the walk over a few micro-batches, and the order of the units of one block."""
    tokens, rows = text_of_costs(run.tokens, run.device)
    batches = -(-len(tokens) // rows)
    walked = min(PROBED_COST_BATCHES, batches)
    modules = list(sole_consumers(run.graph).values())
    ordered = sum(group.layer == modules[0].layer for group in modules)
    times: list[float] = []

    def stop(done: int, total: int) -> None:
        times.append(perf_counter())
        if len(times) > walked + ordered:
            raise _EnoughError

    with meter.stage("try: find costs"), suppress(_EnoughError), run.tokens.images(run.loaded.model):
        times.append(perf_counter())
        backend = dataclasses.replace(run.backend, progress=stop)
        second_order_costs(backend, tokens[: walked * rows], micro_batch=rows, ignored=run.tokens.scored.ignored)
    walking = times[walked] - times[walked - 1]
    ordering = (times[walked + ordered] - times[walked]) / max(1, ordered)  # none where nothing is measurable
    seconds = walking * batches + ordering * len(modules)
    return _stage("find the second-order cost of every unit", seconds, Peak.of(meter.stages[-1]))


def _token_fisher(run: Probed, meter: Meter) -> StageForecast:
    """Token-level Fisher importance: the walk over a few micro-batches."""
    tokens, rows = text_of_costs(run.tokens, run.device)
    batches = -(-len(tokens) // rows)
    walked = min(PROBED_COST_BATCHES, batches)
    times: list[float] = []
    with meter.stage("try: weigh tokens"), run.tokens.images(run.loaded.model):
        times.append(perf_counter())
        backend = dataclasses.replace(
            run.backend, products=quick_products(run.device, run.loaded.dtype),
            progress=lambda _done, _total: times.append(perf_counter()),
        )  # fmt: skip
        token_fisher_scores(backend, tokens[: walked * rows], micro_batch=rows, ignored=run.tokens.refit.ignored)
    seconds = (times[walked] - times[walked - 1]) * batches
    return _stage("weigh every unit token by token", seconds, Peak.of(meter.stages[-1]))


def _restoration(run: Probed, meter: Meter, base: Peak) -> tuple[float, Peak, float]:
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
    with TemporaryDirectory(prefix="saap-") as folder:
        spill = restoration_spill(run.loaded, run.config, Path(folder))
        with meter.stage("try: restore"), suppress(_EnoughError), run.tokens.images(run.loaded.model):
            products = quick_products(run.device, run.loaded.dtype)
            backend = dataclasses.replace(run.backend, spill=spill, products=products, progress=stop)
            restore(backend, _even_plan(run), tokens, settings)
    tried = Peak.of(meter.stages[-1])
    scale = needed.refit_sequences * needed.refit_length / tokens.numel()
    # what is kept elsewhere grows with the tokens there: in the host's memory, or on the disk
    grows = Peak(tried.resident - base.resident, tried.device - base.device)
    resident = base.resident + int(max(0, grows.resident) * (1 if isinstance(spill, Spill) else scale))
    device = base.device + int(max(0, grows.device) * (1 if spill is not None else scale))
    seconds = meter.stages[-1].seconds / probed * blocks * scale
    return seconds, Peak(resident, device), max(0, grows.resident) / tokens.numel()


def _even_plan(run: Probed) -> StructurePlan:
    """A plan in which the first block gives its share as well, as most blocks do."""
    space = dataclasses.replace(run.space, skip_layers=SkipLayers())
    budget = next((target.budget for target in run.targets if target.budget is not None), Budget(removal=0))
    try:
        return check_reachable(run.graph, budget, space)
    except TargetError:
        return check_reachable(run.graph, Budget(removal=0), space)


def _left(run: Probed, target: Target) -> int:
    if target.budget is None:
        return run.graph.parameters
    return check_reachable(run.graph, target.budget, run.space).parameters


def _float_bytes(parameters: int, run: Probed) -> int:
    return parameters * next(run.loaded.model.parameters()).element_size()


def _least(done: Sequence[StageCost], reading: _Rate) -> Peak:
    """Bytes that stay while the model lies in memory: no stage can have a lower peak."""
    peaks = [reading.peak, *(Peak.of(stage) for stage in done[1:])]
    return Peak(min(peak.resident for peak in peaks), min(peak.device for peak in peaks))
