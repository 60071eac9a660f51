"""What a run will take on this machine, from short trials of its own stages; and whether that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from saap.config import Method, PruneConfig, SkipLayers, unit_roles
from saap.data.generated import random_starts, sample_from_model
from saap.errors import ConfigurationError, TargetError
from saap.estimation.calibrate import estimate
from saap.estimation.felt import felt_scores
from saap.evaluation.perplexity import perplexity
from saap.export.placing import check_place
from saap.models.devices import pick_device, quick_float32_products, quick_products, working_dtype
from saap.models.felt import measurable
from saap.models.references import resolve_model
from saap.models.safetensor_files import weight_files
from saap.pipeline.inputs import (
    GENERATION_BATCH,
    LoadedModel,
    RunOptions,
    TokenSets,
    chooses_units,
    finds_costs,
    generated_sequences,
    needs_measuring,
    text_of_costs,
    weighs_tokens,
)
from saap.pipeline.meter import Meter, StageCost
from saap.pipeline.outcome import greedy_answer
from saap.pipeline.targets import Target
from saap.records import ModelGraph, Role, StructurePlan
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
    """What a stage will take. seconds: None where no short trial tells. disk_bytes: that it leaves on the disk."""

    name: str
    seconds: float | None
    peak_resident_bytes: int
    disk_bytes: int = 0


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
    def disk_bytes(self) -> int:
        """Of everything that is written."""
        return sum(stage.disk_bytes for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return {
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "seconds": self.seconds,
            "peak_resident_bytes": self.peak_resident_bytes,
            "disk_bytes": self.disk_bytes,
        }


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


def forecast(run: Probed, meter: Meter) -> Forecast:
    """Try a part of each stage on the model, which is of no use afterwards, and scale it to the whole."""
    config, graph = run.config, run.graph
    with quick_float32_products():
        reading, answering = _reading(run, meter)
        stages = [
            *(
                StageForecast(name=s.name, seconds=s.seconds, peak_resident_bytes=s.peak_resident_bytes)
                for s in run.done
            ),
            _measuring(run, "measure the dense model", reading, answering),
            *_writing(run, meter),
            _estimation(run, meter, reading),
        ]
        base = _least(run.done, reading)
        if finds_costs(config, run.loaded.model, graph):
            stages.append(_costs(run, meter))
        candidates = config.effort_settings.search_evaluations + 1 if needs_measuring(config) else 0
        seconds = candidates * run.tokens.held.tokens.size * reading.seconds
        felt = [_felt(run, meter)] if weighs_tokens(config) else []
        restoring, per_token = _restoration(run, meter, base)
        needed_again = len(run.targets) > 1 or config.target_speedup is not None  # so the dense model stays whole
        copies = _float_bytes(graph.parameters, run) if needed_again else 0
        for target in run.targets:
            label = f" ({target.name})" if len(run.targets) > 1 else ""
            searching = StageForecast(
                name=f"search the structure{label}", seconds=seconds, peak_resident_bytes=reading.peak_resident_bytes
            )
            stages.append(searching)
        stages += felt
        for target in run.targets:
            left = _left(run, target)
            name = f"cut{' and restore' if config.restore else ''}, block by block"
            peak = restoring.peak_resident_bytes + copies
            written = left * run.loaded.dtype.itemsize
            stages.append(
                StageForecast(name=name, seconds=restoring.seconds, peak_resident_bytes=peak, disk_bytes=written)
            )
            again = _measuring(run, "open the result and measure it", reading, answering)
            opened = again.peak_resident_bytes + _float_bytes(left, run) + written + copies  # the file is mapped
            stages.append(dataclasses.replace(again, peak_resident_bytes=opened))
            if config.target_speedup is not None:
                name = "measure the speed of the result"
                stages.append(StageForecast(name=name, seconds=None, peak_resident_bytes=opened))
    needed = config.effort_settings
    return Forecast(
        stages=tuple(stages), refit_tokens=needed.refit_sequences * needed.refit_length, bytes_per_refit_token=per_token
    )


def check_fits(found: Forecast, run: Probed, out: Path | None) -> None:
    """Raise ConfigurationError or OutputError if the run needs more memory or disk than there is, with the remedy."""
    if out is not None:
        check_place(out, found.disk_bytes)
    free = available_bytes()
    if free is None or found.peak_resident_bytes <= free:
        return
    worst = max(found.stages, key=lambda stage: stage.peak_resident_bytes)
    others = [stage for stage in found.stages if not stage.name.startswith("cut")]
    remedy = "Use a machine with more memory, or a smaller model"
    if max(stage.peak_resident_bytes for stage in others) <= free and run.config.restore:
        lacking = found.peak_resident_bytes - free
        fewer = (
            found.refit_tokens - int(lacking / found.bytes_per_refit_token) - 1 if found.bytes_per_refit_token else 0
        )
        fewer = fewer // 1024 * 1024
        remedy = f"Use --refit-tokens {fewer}" if fewer >= 1024 else "Use --no-restore"
    raise ConfigurationError(
        f"The stage {worst.name!r} needs {found.peak_resident_bytes / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB "
        "are free", remedy,
    )  # fmt: skip


def check_weights_fit(source: str | Path, options: RunOptions) -> None:
    """Raise ConfigurationError, before they are read, if the weights alone need more memory than there is.

    Only for safetensors on the CPU: of other files the size in memory is not known before they are read.
    """
    resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
    device = pick_device(options.device)
    free = available_bytes()
    if resolved.gguf_file is not None or device.type != "cpu" or free is None:
        return
    stored = sum(file.stat().st_size for file in weight_files(resolved.folder))
    needed = stored // resolved.dtype.itemsize * working_dtype(device, resolved.dtype).itemsize
    if needed > free:
        raise ConfigurationError(
            f"The weights of {source} need {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are free",
            "Use a machine with more memory, or a smaller model",
        )


def available_bytes() -> int | None:
    """Memory that this process has or could get without swapping; None where the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        own = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return (int(fields["MemAvailable"].split()[0]) + int(own["VmRSS"].split()[0])) * 1024
    except (OSError, KeyError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class _Rate:
    """Seconds for one token of a forward pass, and the peak while it runs."""

    seconds: float
    peak_resident_bytes: int


def _reading(run: Probed, meter: Meter) -> tuple[_Rate, float]:
    """The forward pass, and the seconds of a short greedy answer."""
    tokens = run.tokens.evaluation[:PROBED_TOKENS]
    perplexity(run.loaded.model, tokens[:512], leading=run.tokens.leading)  # the first pass is slower than all others
    with meter.stage("try: read"):
        perplexity(run.loaded.model, tokens, leading=run.tokens.leading)
    read = meter.stages[-1]
    with meter.stage("try: answer"):
        greedy_answer(run.loaded.model, run.loaded.tokenizer)
    return _Rate(read.seconds / len(tokens), read.peak_resident_bytes), meter.stages[-1].seconds


def _measuring(run: Probed, name: str, reading: _Rate, answering: float) -> StageForecast:
    seconds = reading.seconds * run.tokens.evaluation.size + answering
    return StageForecast(name=name, seconds=seconds, peak_resident_bytes=reading.peak_resident_bytes)


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
    return [
        StageForecast(
            name="let the model write text of its own", seconds=tried.seconds / PROBED_STEPS * steps,
            peak_resident_bytes=tried.peak_resident_bytes,
        )
    ]  # fmt: skip


def _estimation(run: Probed, meter: Meter, reading: _Rate) -> StageForecast:
    name = "estimate the importance of every unit"
    scored = run.tokens.scored
    units = sum(group.units for group in run.graph.groups)
    if run.config.method is not Method.SAAP:
        return StageForecast(name=name, seconds=None, peak_resident_bytes=reading.peak_resident_bytes)
    few = dataclasses.replace(scored, tokens=scored.tokens[:PROBED_SAMPLES], inputs=scored.inputs[:PROBED_SAMPLES])
    with meter.stage("try: estimate"), run.tokens.images(run.loaded.model):
        estimate(
            run.loaded.model, run.graph, few, roles=unit_roles(run.config.roles) or [Role.FFN, Role.ATTENTION],
            element_order=run.config.element_score, aggregation=run.config.aggregation,
        )  # fmt: skip
    tried = meter.stages[-1]
    return StageForecast(
        name=name, seconds=tried.seconds / len(few.tokens) * len(scored.tokens),
        peak_resident_bytes=tried.peak_resident_bytes, disk_bytes=units * _STATISTICS_BYTES,
    )  # fmt: skip


def _costs(run: Probed, meter: Meter) -> StageForecast:
    """Second-order costs: the walk over a few micro-batches, and the order of the units of one block."""
    tokens, rows = text_of_costs(run.tokens, run.device)
    batches = -(-len(tokens) // rows)
    walked = min(PROBED_COST_BATCHES, batches)
    modules = measurable(run.graph)
    ordered = sum(group.layer == modules[0].layer for group in modules)
    times: list[float] = []

    def stop(done: int, total: int) -> None:
        times.append(perf_counter())
        if done == walked + ordered:
            raise _EnoughError

    with meter.stage("try: find costs"), suppress(_EnoughError), run.tokens.images(run.loaded.model):
        times.append(perf_counter())
        second_order_costs(
            run.loaded.model, run.graph, tokens[: walked * rows], micro_batch=rows, ignored=run.tokens.scored.ignored,
            progress=stop,
        )  # fmt: skip
    walking = times[walked] - times[walked - 1]
    ordering = (times[walked + ordered] - times[walked]) / max(1, ordered)  # none where nothing is measurable
    return StageForecast(
        name="find the second-order cost of every unit",
        seconds=walking * batches + ordering * len(modules),
        peak_resident_bytes=meter.stages[-1].peak_resident_bytes,
    )


def _felt(run: Probed, meter: Meter) -> StageForecast:
    """Scores token by token: the walk over a few micro-batches."""
    tokens, rows = text_of_costs(run.tokens, run.device)
    batches = -(-len(tokens) // rows)
    walked = min(PROBED_COST_BATCHES, batches)
    times: list[float] = []
    with meter.stage("try: weigh tokens"), run.tokens.images(run.loaded.model):
        times.append(perf_counter())
        felt_scores(
            run.loaded.model, run.graph, tokens[: walked * rows], micro_batch=rows, ignored=run.tokens.refit.ignored,
            progress=lambda _done, _total: times.append(perf_counter()),
            products=quick_products(run.device, run.loaded.dtype),
        )  # fmt: skip
    return StageForecast(
        name="weigh every unit token by token",
        seconds=(times[walked] - times[walked - 1]) * batches,
        peak_resident_bytes=meter.stages[-1].peak_resident_bytes,
    )


def _restoration(run: Probed, meter: Meter, base: int) -> tuple[StageForecast, float]:
    """The first blocks of the restoration, with as many of its tokens as a short trial may have; spoils the model.

    Returns the stage and the bytes of its peak for each token. base: bytes without it.
    """
    name = "try: restore"
    if not run.config.restore:
        return StageForecast(name=name, seconds=0.0, peak_resident_bytes=base), 0.0
    tokens = run.tokens.tensor("refit", run.device)
    tokens = tokens[: max(1, min(len(tokens), PROBED_REFIT_TOKENS // tokens.shape[1]))]
    needed = run.config.effort_settings

    blocks = len(run.graph.blocks)
    probed = min(PROBED_BLOCKS, blocks)

    def stop(done: int, total: int) -> None:
        if done == probed:
            raise _EnoughError

    settings = RestoreSettings(
        second_order=needed.second_order and chooses_units(run.config),
        products=quick_products(run.device, run.loaded.dtype),
    )
    with meter.stage(name), suppress(_EnoughError), run.tokens.images(run.loaded.model):
        restore(run.loaded.model, run.graph, _even_plan(run), tokens, settings, stop)
    tried = meter.stages[-1]
    scale = needed.refit_sequences * needed.refit_length / tokens.numel()
    per_token = max(0, tried.peak_resident_bytes - base) / tokens.numel()
    peak = base + int(per_token * tokens.numel() * scale)
    seconds = tried.seconds / probed * blocks * scale
    return StageForecast(name=name, seconds=seconds, peak_resident_bytes=peak), per_token


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


def _least(done: Sequence[StageCost], reading: _Rate) -> int:
    """Bytes that stay while the model lies in memory: no stage can have a lower peak."""
    return min([reading.peak_resident_bytes, *(stage.peak_resident_bytes for stage in done[1:])])
