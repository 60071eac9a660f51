"""The measured table of what decoding costs, and the user's cache of such tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from saap.core.errors import OutputError, TargetError
from saap.core.manifest import recorded_versions
from saap.core.records import Layout, ModelGraph, Role, StructurePlan, digest_of
from saap.core.storage import write_whole
from saap.evaluation.speed import speed_ups
from saap.models.checkpoint.differences import mark_pruned
from saap.models.loading.devices import copied
from saap.pipeline.evaluate.speed import opened_in, pair_of_speeds, timed, weights_name
from saap.pipeline.shared.progress import Reporter
from saap.settings.measure import SpeedSettings
from saap.settings.prune import PrunableRole, PruneConfig, unit_roles
from saap.structure_search.budget import DecodeCosts, curve_through
from saap.structure_search.plan import make_plan
from saap.surgery.cut import cut

FORMAT = 1
_COSTS = TypeAdapter(DecodeCosts)
FRACTIONS = (0.7, 0.4)
"""Of its units that every group of a role keeps in the trials, beside the least possible."""
FEW_UNITS = 4
"""Groups of so many units or fewer are tried at every number of them."""


def speed_settings(config: PruneConfig, rounds: int = 7) -> SpeedSettings:
    """How a requested speed is measured: short prompts, since it is that of decoding."""
    return SpeedSettings(
        runtime=config.runtime, gguf_type=config.gguf_type, prompt_tokens=8, new_tokens=16, rounds=rounds
    )


def decode_costs(model: nn.Module, graph: ModelGraph, config: PruneConfig, reporter: Reporter) -> DecodeCosts:
    """Shares of the decoding time that smaller modules save on this machine, from the cache or measured now.

    Each trial is a copy of the model in which all modules of one role have been cut alike; it takes turns with the
    dense model. Raises ModelError, ExportError if the runtime cannot compute the model.
    """
    settings = speed_settings(config)
    file = _cache_file(model, graph, config, settings)
    known = _read(file)
    if known is not None:
        reporter.note(f"time of decoding from {file}")
        return known
    trials = _trials(graph, config)
    points: dict[Role, list[tuple[float, float]]] = {}
    block = None
    with opened_in(model, settings) as dense:
        for done, (role, fraction, plan) in enumerate(trials):
            with opened_in(_trial(model, graph, plan), settings) as smaller:
                trial, whole = timed([smaller, dense], settings)
            saved = 1 - 1 / speed_ups(trial, whole)[1]
            if role is None:
                block = saved / len(plan.dropped_blocks)
            else:
                points.setdefault(role, []).append((fraction, saved))
            reporter.advance(done + 1, len(trials))
    costs = DecodeCosts(curves={role: curve_through(found) for role, found in points.items()}, block=block)
    _write(file, costs, reporter)
    return costs


def trial_speedup(model: nn.Module, graph: ModelGraph, plan: StructurePlan, settings: SpeedSettings) -> float:
    """Speed of decoding of a copy that is cut by the plan, over that of the model."""
    return speed_ups(*pair_of_speeds(_trial(model, graph, plan), model, settings))[1]


def _trials(graph: ModelGraph, config: PruneConfig) -> list[tuple[Role | None, float, StructurePlan]]:
    """What is measured: (role, fraction of its units that stay, plan); role None: half of the blocks have left."""
    found: list[tuple[Role | None, float, StructurePlan]] = []
    for role in unit_roles(config.roles):
        groups = graph.of_role(role)
        if not groups:
            raise TargetError(f"no {role} groups can be pruned in this model", "Leave this role out of --roles")
        step = config.align if role.of_channels else 1
        kept_sets = {tuple(max(min(step, g.units), _rounded(g.units * f, step)) for g in groups) for f in FRACTIONS}
        kept_sets.add(tuple(min(step, g.units) for g in groups))
        if max(group.units for group in groups) <= FEW_UNITS:
            kept_sets |= {tuple(min(size, g.units) for g in groups) for size in range(1, FEW_UNITS)}
        units = sum(group.units for group in groups)
        for kept in sorted(kept_sets, reverse=True):
            if sum(kept) < units:
                keep = {group.name: tuple(range(size)) for group, size in zip(groups, kept, strict=True)}
                found.append((role, sum(kept) / units, _plan(graph, keep, ())))
    if PrunableRole.BLOCK in config.roles:
        found.append((None, 0.0, _plan(graph, {}, tuple(range(len(graph.blocks)))[1::2])))
    return found


def _rounded(size: float, step: int) -> int:
    return round(size / step) * step


def _plan(graph: ModelGraph, keep: Mapping[str, tuple[int, ...]], dropped: Sequence[int]) -> StructurePlan:
    return make_plan(graph, keep, dropped, layout=Layout.ADAPTIVE, strategy="trial", align=1)


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
    versions = recorded_versions()
    described = {
        "format": FORMAT,
        "machine": machine(next(model.parameters()).device),
        "model_type": getattr(model.config, "model_type", type(model).__name__),
        "shapes": graph.shapes,
        "groups": [[group.name, group.units] for group in graph.groups],
        "runtime": settings.runtime,
        "version": versions.get(settings.runtime.load().package, ""),
        "weights": weights_name(model, settings),
        "roles": sorted(config.roles),
        "align": config.align,
    }
    return cache_folder() / f"{digest_of(described)[:32]}.json"


def machine(device: torch.device) -> dict[str, str | int]:
    """What decides how fast a model is here: the processor, the threads that are used, the accelerator."""
    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "host": platform.node(), "architecture": platform.machine(), "processor": name,
        "threads": torch.get_num_threads(), "accelerator": accelerator,
    }  # fmt: skip


def _read(file: Path) -> DecodeCosts | None:
    try:
        return _COSTS.validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _write(file: Path, costs: DecodeCosts, reporter: Reporter) -> None:
    """Keep the table; a cache that cannot be written costs the next run its time and nothing else."""
    try:
        write_whole(file, _COSTS.dump_json(costs, indent=1))
        reporter.note(f"time of decoding measured and kept in {file}")
    except OutputError as error:
        reporter.note(f"the time of decoding was measured but not kept: {error}")
