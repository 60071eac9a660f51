"""What a run will take on this machine, by formulas from sizes and one measured speed; and whether that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from saap.core.errors import ConfigurationError
from saap.evaluation.perplexity import perplexity
from saap.models.checkpoint.safetensor_files import weight_files
from saap.models.loading import memory
from saap.models.loading.devices import pick_device, quick_float32_products, working_dtype
from saap.models.loading.references import DEQUANTISED, resolve_model
from saap.pipeline.prune.planning import search_evaluations, trial_plan
from saap.pipeline.prune.steps import requested_stages
from saap.pipeline.shared import stages
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.memory_estimate import Sizes, refit_tokens, stage_needs
from saap.pipeline.shared.outcome import ANSWER_TOKENS
from saap.pipeline.shared.stages import Stage, steps_of
from saap.pipeline.shared.targets import check_space
from saap.pipeline.shared.tokens import needs_measuring
from saap.settings.prune import PrunableRole, unit_roles
from saap.settings.registry import Importance, Method

TIMED_TOKENS = 1024
STEP_TOKENS = 8
"""A step of writing takes about as long as reading so many tokens at once."""
SOLVING = 10
"""Products of matrices as wide as what a consumer reads that its least-squares problem takes, about."""
_STATISTICS_BYTES = 5 * 8
PASSES: Mapping[Importance, float] = {Importance.TOKEN_FISHER: 3.5, Importance.REAP: 2, Importance.FREQUENCY: 1}
"""What the scores of a token take over its forward pass; the others take 4.7 times as long."""
SMALLER = "Use a machine with more memory, or a smaller model"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageForecast:
    """What a stage will take. seconds: None where no formula tells. disk_bytes: that it leaves on the disk.

    peak_device_bytes: of an accelerator.
    """

    name: str
    seconds: float | None
    peak_resident_bytes: int
    disk_bytes: int = 0
    peak_device_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """All stages in order. refit_tokens: of the reconstruction; each adds `bytes_per_refit_token` to its peak."""

    stages: tuple[StageForecast, ...]
    refit_tokens: int
    bytes_per_refit_token: float

    def worst(self, resource: str) -> StageForecast:
        """The stage that needs most of a resource, by the name of its field."""
        worst: StageForecast = max(self.stages, key=lambda stage: getattr(stage, resource))
        return worst

    @property
    def disk_bytes(self) -> int:
        """Of everything that is written."""
        return sum(stage.disk_bytes for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able data: the stages, the sum of what adds up and the peaks."""
        peaks = ("peak_resident_bytes", "peak_device_bytes")
        return {
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "seconds": sum(stage.seconds or 0.0 for stage in self.stages),
            "disk_bytes": self.disk_bytes,
            **{name: getattr(self.worst(name), name) for name in peaks},
        }


def forecast(run: Run) -> Forecast:
    """All stages of a prepared run: those that it has behind it, and the others by formulas."""
    config, loaded, on_device = run.config, run.loaded, run.device.type != "cpu"
    ahead = [stage for stage in requested_stages(run) if stage not in (*stages.PREPARE, stages.PLACE)]
    sizes = dataclasses.replace(Sizes.of(loaded.model, run.device), pages=0)  # those of the result are added
    seconds_of_token, tokens = _seconds_of_token(run), _tokens(run)
    needs, base = stage_needs(sizes, config), memory.of_process()
    plans = {target.name: trial_plan(run.graph, target, run.space) for target in run.targets}
    left = {name: plan.parameters * loaded.dtype.itemsize for name, plan in plans.items()}  # bytes of the results
    kept = sizes.weights if len(left) > 1 or config.target_speedup is not None else 0  # the dense model
    found = [StageForecast(**stage.model_dump()) for stage in run.meter.stages]
    for step in steps_of(ahead, list(left)):
        stage, taken, disk = step.stage, needs.get(step.stage, 0), 0
        work = float(tokens.get(stage, 0))
        if stage in (stages.ESTIMATE, stages.KEEP_SCORES):
            disk = _STATISTICS_BYTES * sum(group.units for group in run.graph.groups)
        if stage in (stages.CUT, stages.RESTORE):
            taken, disk = taken + kept, left[step.target]
        if stage is stages.RESTORE:
            taken += 0 if loaded.spills else sizes.captured_activations(config)
            work += SOLVING * sizes.blocks * sizes.widest**3 / sum(p.numel() for p in loaded.model.parameters())
        if stage in (stages.MEASURE, stages.TIME_RESULT):
            taken += kept + left[step.target]  # the file is mapped while it is read
        found.append(
            StageForecast(
                name=step.title, seconds=work * seconds_of_token if stage in tokens else None, disk_bytes=disk,
                peak_resident_bytes=base + (0 if on_device else taken),
                peak_device_bytes=sizes.weights + taken if on_device else 0,
            )
        )  # fmt: skip
    per_token = 0.0 if loaded.spills or on_device else float(sizes.captured_by_token)
    return Forecast(stages=tuple(found), refit_tokens=refit_tokens(config), bytes_per_refit_token=per_token)


def _seconds_of_token(run: Run) -> float:
    """The time of one token in a forward pass, measured."""
    tokens = np.concatenate(list(run.tokens.evaluation.values()))[:TIMED_TOKENS]
    with quick_float32_products():
        perplexity(run.loaded.model, tokens[:128], leading=run.tokens.leading)  # the first pass is slower
        start = perf_counter()
        perplexity(run.loaded.model, tokens, leading=run.tokens.leading)
    return (perf_counter() - start) / len(tokens)


def _tokens(run: Run) -> dict[Stage, float]:
    """Tokens of each stage, times what one takes there over its forward pass: back, gradients, Gram matrices."""
    config, tokens = run.config, run.tokens
    evaluated = sum(ids.size for ids in tokens.evaluation.values())
    answer = STEP_TOKENS * ANSWER_TOKENS * (run.loaded.tokenizer is not None)
    held = tokens.held.tokens.size if needs_measuring(config) else 0
    blocks = len(run.graph.blocks) if PrunableRole.BLOCK in config.roles else 0  # each is measured alone
    found: dict[Stage, float] = {
        stages.MEASURE_DENSE: answer + (0 if tokens.dense else evaluated),
        stages.ESTIMATE: PASSES.get(config.importance, 4.7) * tokens.scored.tokens.size,
        stages.FIND_COSTS: 4.3 * tokens.scored.tokens.size,
        stages.KEEP_SCORES: 0,
        stages.EVALUATE_DENSE: held,
        stages.SEARCH: held * (search_evaluations(run) * bool(unit_roles(config.roles)) + blocks),
        stages.CUT: 0,
        stages.RESTORE: 4.9 * refit_tokens(config),
        stages.MEASURE: answer + evaluated,
    }
    if config.method is not Method.SAAP:
        del found[stages.ESTIMATE]  # baselines' scores have no formula
    return found


def check_fits(found: Forecast, run: Run, smaller: str = SMALLER) -> None:
    """Raise ConfigurationError or OutputError if the run needs more memory or disk than there is, with the remedy.

    smaller: the remedy if the memory of the machine is too small for the weights.
    """
    made = (stages.CUT.title, stages.RESTORE.title)
    results = [stage.disk_bytes for stage in found.stages if stage.name.startswith(made)]
    check_space(run.options, results, found.disk_bytes - sum(results))
    available, worst = memory.of_device(run.device), found.worst("peak_device_bytes")
    if available is not None:
        what = f"The stage {worst.name!r}"
        _require(what, worst.peak_device_bytes, available, "Use --device cpu", f" on {run.device}")
    free, worst = memory.of_machine(), found.worst("peak_resident_bytes")
    others = [stage.peak_resident_bytes for stage in found.stages if not stage.name.startswith(stages.RESTORE.title)]
    remedy = ""
    if max(others, default=0) <= free and run.config.restore:
        lacking, each = worst.peak_resident_bytes - free, found.bytes_per_refit_token
        fewer = (found.refit_tokens - int(lacking / each) - 1) // 1024 * 1024 if each else 0
        remedy = f"Use --refit-tokens {fewer}" if fewer >= 1024 else "Use --no-restore"
    _require(f"The stage {worst.name!r}", worst.peak_resident_bytes, free, remedy or smaller)


def check_weights_fit(source: str | Path, options: RunOptions, smaller: str = SMALLER) -> None:
    """Raise ConfigurationError, before they are read, if the weights alone need more memory than there is.

    Only for safetensors on the CPU: of other files the size in memory is not known before they are read.
    """
    resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
    device, free = pick_device(options.device), memory.of_machine()
    if resolved.gguf_file is not None or device.type != "cpu":
        return
    stored = sum(file.stat().st_size for file in weight_files(resolved.folder))
    packed = DEQUANTISED.get(resolved.quantisation or "")
    weights = stored * packed if packed else stored // resolved.dtype.itemsize
    needed = weights * working_dtype(device, resolved.dtype).itemsize
    _require(f"The model {source}", needed, free, smaller)


def _require(what: str, needed: int, free: int, remedy: str, where: str = "") -> None:
    if needed > free:
        size = f"{needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are free{where}"
        raise ConfigurationError(f"{what} needs {size}", remedy)
