"""A requested speed-up: the measured costs of decoding, the user's cache of them, the budget, and what was reached."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from saap.core.errors import OutputError
from saap.core.manifest import SpeedRecord, recorded_versions
from saap.core.records import Layout, ModelGraph, Role, StructurePlan, digest_of
from saap.core.storage import write_whole
from saap.evaluation.speed import speed_ups
from saap.models.checkpoint.pruned_structure import mark_pruned
from saap.models.loading.devices import copied
from saap.pipeline.evaluate.speed import opened_in, pair_of_speeds, timed, weights_name
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.progress import Reporter
from saap.settings.evaluate import SpeedSettings
from saap.settings.prune import PrunableRole, PruneConfig, unit_roles
from saap.structure_search.budget import DecodeCosts, TimeBudget, budget_for_speedup, curve_through, trial_structures
from saap.structure_search.plan import SearchSpace, check_reachable, make_plan
from saap.surgery.cut import cut

FORMAT = 1
_COSTS = TypeAdapter(DecodeCosts)
ROUNDS = 21
"""Of the two measurements that everything hangs on: longer than those of the table, since other work comes and goes."""


def speed_settings(config: PruneConfig, rounds: int = 7) -> SpeedSettings:
    """How a requested speed is measured: short prompts, since it is that of decoding."""
    return SpeedSettings(
        runtime=config.runtime, gguf_type=config.gguf_type, prompt_tokens=8, new_tokens=16, rounds=rounds
    )


def budget_for_speed(
    model: nn.Module, graph: ModelGraph, space: SearchSpace, config: PruneConfig, reporter: Reporter
) -> TimeBudget:
    """The budget for the requested speed-up, from the measured costs of decoding.

    A plan of the requested speed, made without scores, is then measured itself: it shows that the runtime computes
    such a model, and corrects the costs by what they are off where modules of several roles shrink together.
    Raises TargetError for what cannot be reached, ModelError, ExportError for what the runtime cannot compute.
    """
    budget = budget_for_speedup(graph, _decode_costs(model, graph, config, reporter), config.target_speedup or 1.0)
    plan = check_reachable(graph, budget, space)
    predicted, measured = budget.speedup(graph, plan), trial_speedup(model, graph, plan, speed_settings(config, ROUNDS))
    reporter.note(f"a plan of the speed {predicted:.3f} by the table has the speed {measured:.3f}")
    return budget.corrected(predicted=predicted, measured=measured)


def reached_speed(run: Run, budget: TimeBudget, plan: StructurePlan, pruned: nn.Module) -> SpeedRecord:
    """Speed of the result compared with the dense model, measured in turns."""
    settings = speed_settings(run.config, ROUNDS)
    fast, slow = pair_of_speeds(pruned, run.loaded.model, settings)
    return SpeedRecord(
        runtime=str(settings.runtime), weights=weights_name(pruned, settings), threads=torch.get_num_threads(),
        asked=run.config.target_speedup or 1.0, predicted=budget.speedup(run.graph, plan),
        reached=speed_ups(fast, slow)[1], dense_tokens_per_second=slow.decode, tokens_per_second=fast.decode,
    )  # fmt: skip


def trial_speedup(model: nn.Module, graph: ModelGraph, plan: StructurePlan, settings: SpeedSettings) -> float:
    """Speed of decoding of a copy that is cut by the plan, over that of the model."""
    return speed_ups(*pair_of_speeds(_trial(model, graph, plan), model, settings))[1]


def _decode_costs(model: nn.Module, graph: ModelGraph, config: PruneConfig, reporter: Reporter) -> DecodeCosts:
    """Shares of the decoding time that smaller modules save on this machine, from the cache or measured now.

    Each trial is a copy of the model in which all modules of one role, or half of the blocks, have been cut alike; it
    takes turns with the dense model.
    """
    settings = speed_settings(config)
    file = _cache_file(model, graph, config, settings)
    with suppress(OSError, ValidationError):
        known = _COSTS.validate_json(file.read_bytes())
        reporter.note(f"time of decoding from {file}")
        return known
    costs = _measured_costs(model, graph, config, settings, reporter)
    try:
        write_whole(file, _COSTS.dump_json(costs, indent=1))
        reporter.note(f"time of decoding measured and kept in {file}")
    except OutputError as error:  # costs the next run its time and nothing else
        reporter.note(f"the time of decoding was measured but not kept: {error}")
    return costs


def _measured_costs(
    model: nn.Module, graph: ModelGraph, config: PruneConfig, settings: SpeedSettings, reporter: Reporter
) -> DecodeCosts:
    units = trial_structures(graph, unit_roles(config.roles), config.align)
    half = tuple(range(1, len(graph.blocks), 2)) if PrunableRole.BLOCK in config.roles else ()
    points: dict[Role, list[tuple[float, float]]] = {}

    def saved(done: int, plan: StructurePlan) -> float:
        with opened_in(_trial(model, graph, plan), settings) as smaller:
            trial, whole = timed([smaller, dense], settings)
        reporter.advance(done, len(units) + bool(half))
        return 1 - 1 / speed_ups(trial, whole)[1]

    with opened_in(model, settings) as dense:
        for done, (role, fraction, keep) in enumerate(units, start=1):
            plan = make_plan(graph, keep, (), layout=Layout.ADAPTIVE, strategy="trial", align=1)
            points.setdefault(role, []).append((fraction, saved(done, plan)))
        block = None
        if half:
            plan = make_plan(graph, {}, half, layout=Layout.ADAPTIVE, strategy="trial", align=1)
            block = saved(len(units) + 1, plan) / len(half)
    return DecodeCosts(curves={role: curve_through(found) for role, found in points.items()}, block=block)


def _trial(model: nn.Module, graph: ModelGraph, plan: StructurePlan) -> nn.Module:
    """A cut copy of the model that any runtime opens."""
    trial = copied(model)
    structure = cut(trial, graph, plan)
    if not structure.is_empty:
        mark_pruned(trial, structure)
    return trial


def cache_folder() -> Path:
    """Where tables lie: `saap/decode-costs` in the user's cache folder (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "saap" / "decode-costs"


def _cache_file(model: nn.Module, graph: ModelGraph, config: PruneConfig, settings: SpeedSettings) -> Path:
    """One file for each machine, shape of the model, runtime, type of weights, roles and alignment."""
    device = next(model.parameters()).device
    machine = {
        "host": platform.node(), "architecture": platform.machine(), "processor": platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }  # fmt: skip
    described = {
        "format": FORMAT,
        "machine": machine,
        "model_type": getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        "shapes": graph.shapes,
        "groups": [[group.name, group.units] for group in graph.groups],
        "runtime": settings.runtime,
        "version": recorded_versions().get(settings.runtime.load().package, ""),
        "weights": weights_name(model, settings),
        "roles": sorted(config.roles),
        "align": config.align,
    }
    return cache_folder() / f"{digest_of(described)[:32]}.json"
