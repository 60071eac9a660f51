"""Offloading decisions that keep a run within the memory of its compute device.

First the activations of the reconstruction are offloaded, then the weights, which are read block by block.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saap.core.errors import ConfigurationError, ModelError
from saap.discovery.blocks import find_blocks
from saap.models.loading import memory
from saap.models.loading.devices import pick_device, working_dtype
from saap.models.loading.pretrained import load_offloaded, model_without_weights, open_skeleton
from saap.models.loading.references import ResolvedModel, resolve_model
from saap.models.walk.offload import offloaded
from saap.models.walk.spill import Spill
from saap.pipeline.shared.inputs import LoadedModel, RunOptions, open_model
from saap.pipeline.shared.memory_estimate import Needs, Sizes
from saap.settings.prune import PrunableRole, PruneConfig
from saap.settings.registry import Method

RESERVE_BYTES = 500 * 10**6
"""Memory used without a model: libraries that are not loaded yet, or workspaces of accelerator libraries."""


def open_within(
    source: str | Path | nn.Module, config: PruneConfig, options: RunOptions, tokenizer: Any
) -> LoadedModel:
    """As `open_model`, but with offloading if the run would not fit into memory.

    The limit is `options.max_memory`. Without it an accelerator uses its free memory, and the CPU has no limit. Raises
    ConfigurationError if the limit is too small for the model, or for the needs of `config`.
    """
    given = options.max_memory
    if isinstance(source, nn.Module):
        if given is not None:
            raise ConfigurationError(
                "--max-memory does not apply to a model that is in memory already", "Give the folder that it came from"
            )
        return _spilling(open_model(source, options, tokenizer), config, 0, None)
    device = pick_device(options.device)
    base = _base(device)  # before weights are read, which count as memory of the process
    limit = memory.of_device(device) if given is None else given
    if limit is None or options.device_map is not None:
        return open_model(source, options, tokenizer)
    resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
    dtype = working_dtype(device, resolved.dtype)
    try:
        least, whole = limits(resolved, config, dtype, device)
    except ModelError:  # it cannot be read part by part, so it must fit
        if given is not None:
            sizes = Sizes.of(model_without_weights(resolved), device)
            if base + Needs.of(sizes, config).spilled > given:
                raise
        return _spilling(open_model(resolved, options, tokenizer), config, base, given)
    if whole <= limit:
        return _spilling(open_model(resolved, options, tokenizer), config, base, limit)
    size = _gigabytes(limit)
    found = f"The free memory of {device} ({size})" if given is None else f"--max-memory {size}"
    if least > limit:
        raise ConfigurationError(
            f"{found} is too small for this model, which needs {_gigabytes(least)}"
            f"{', or less with --no-restore' if config.restore else ''}",
            "Use --device cpu" if given is None else f"Use --max-memory {_gigabytes(least)}",
        )
    _check_possible(config, whole, found)
    fresh = partial(load_offloaded, resolved, find_blocks, device=device, dtype=dtype)
    return open_model(resolved, options, tokenizer, fresh=fresh, skeleton=open_skeleton(resolved, dtype)[0])


def limits(resolved: ResolvedModel, config: PruneConfig, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Minimum memory of a run in bytes, and memory from which on all weights can be in memory.

    dtype: to compute in. Raises ModelError if the files cannot be read part by part.
    """
    sizes, base = Sizes.of(open_skeleton(resolved, dtype)[0], device), _base(device)
    needs = Needs.of(sizes, config)
    return base + needs.offloaded, base + needs.spilled


def offloading_remedy(source: str | Path, config: PruneConfig, options: RunOptions) -> str:
    """The flag with which the run fits into the memory of the CPU, '' if there is none; before weights are read."""
    device = pick_device(options.device)
    if options.max_memory is not None or device.type != "cpu":
        return ""
    try:
        resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
        least, whole = limits(resolved, config, working_dtype(device, resolved.dtype), device)
        _check_possible(config, whole, "")
    except (ConfigurationError, ModelError):
        return ""
    fits = least <= memory.of_machine() and not config.prunes_vocabulary
    return f"Leave out --dry-run, and use --max-memory {_gigabytes(least)}" if fits else ""


def _spilling(loaded: LoadedModel, config: PruneConfig, base: int, limit: int | None) -> LoadedModel:
    """Load the model into memory, and decide whether the reconstruction must offload activations.

    base: bytes used without the model. limit: bytes for the whole run; None for the memory of the device.
    """
    device = next(loaded.model.parameters()).device
    limit = memory.of_device(device) if limit is None else limit
    if limit is None or not config.restore:
        return loaded
    needed = base + Needs.of(Sizes.of(loaded.model, device), config).resident
    return dataclasses.replace(loaded, spills=needed > limit)


def _base(device: torch.device) -> int:
    return RESERVE_BYTES + (memory.of_process() if device.type == "cpu" else 0)


def _check_possible(config: PruneConfig, whole: int, limit: str) -> None:
    """Reject settings that need the whole model in memory. limit: in words."""
    impossible = {
        f"--method {config.method}": config.method is not Method.SAAP,
        "--target-speedup": config.target_speedup is not None,
        "--roles hidden": PrunableRole.HIDDEN in config.roles,
        "--roles block": PrunableRole.BLOCK in config.roles,
    }
    for name, given in impossible.items():
        if given:
            raise ConfigurationError(
                f"{name} needs the whole model in memory, {_gigabytes(whole)}, and there is less: {limit}",
                "Leave it out, or allow more memory",
            )


def _gigabytes(count: int) -> str:
    """Gigabytes, rounded up, in the format of the flag."""
    return f"{-(-count // 10**8) / 10:g}GB"


def restoration_spill(loaded: LoadedModel, config: PruneConfig, folder: Path) -> Spill | None:
    """Storage of the reconstruction's activations: with the weights (None), in host memory, or in a folder."""
    if not loaded.spills:
        return None if offloaded(loaded.model) is None else Spill(folder)
    device = next(loaded.model.parameters()).device
    captured = Sizes.of(loaded.model, device).captured_activations(config)
    return Spill(None if device.type != "cpu" and captured < memory.of_machine() else folder)
