"""Inputs of a run: options, devices, and the dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saap.core.errors import ConfigurationError
from saap.core.records import ModelRef
from saap.models.loading.devices import check_known, computable, pick_device, pick_dtype, require_values, spread_over
from saap.models.loading.pretrained import load_model, load_tokenizer, model_ref
from saap.models.loading.references import ResolvedModel, resolve_model
from saap.models.walk.processes import Processes
from saap.settings.run import RunOptions as RunOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A loaded dense model. dtype: of the weights to write. owned: whether the run may change it in place.

    folder: its origin, for the licence files. quantisation: format of its weights, None if they are not quantised.
    fresh, skeleton: if the weights stay in their files, a function that opens it again, and the model without weights
    for discovery. spills: whether the activations of the reconstruction do not fit into memory next to the weights.
    trust_remote_code: whether code of the folder may run.
    """

    model: nn.Module
    tokenizer: Any | None
    ref: ModelRef
    dtype: torch.dtype
    owned: bool
    folder: Path | None = None
    fresh: Callable[[], nn.Module] | None = None
    skeleton: nn.Module | None = None
    spills: bool = False
    quantisation: str | None = None
    trust_remote_code: bool = False


def place_of(source: str | Path | nn.Module, options: RunOptions) -> torch.device:
    """Device of the run: that of a loaded model, or the selected one. Raises ConfigurationError."""
    return next(source.parameters()).device if isinstance(source, nn.Module) else pick_device(options.device)


def check_devices(options: RunOptions, source: str | Path | nn.Module, processes: Processes) -> RunOptions:
    """The options with the device of this process, unless the model is loaded already.

    Raises ConfigurationError for an unknown device map, or one that conflicts with another option.
    """
    loaded = isinstance(source, nn.Module)
    spread = options.device_map is not None or (isinstance(source, nn.Module) and spread_over(source) is not None)
    if processes.count > 1 and spread:
        raise ConfigurationError(
            f"Blocks cannot be on several devices, since each of {processes.count} processes has the whole model",
            "Start it without torchrun or accelerate launch, or leave the device map out",
        )
    if options.device_map is not None:
        check_known(options.device_map)
        reasons = {
            "the model is in memory already; load it with that device_map, or give its folder": loaded,
            "--device selects one device": options.device != "auto",
            "--max-memory keeps the weights in their files": options.max_memory is not None,
        }
        for reason in (reason for reason, holds in reasons.items() if holds):
            raise ConfigurationError(f"--device-map cannot be used, since {reason}", "Leave one of the two out")
    if processes.count == 1 or loaded:
        return options
    return options.model_copy(update={"device": str(processes.device(pick_device(options.device)))})


def resolve_with_tokenizer(
    source: str | Path | nn.Module, options: RunOptions, tokenizer: Any | None
) -> tuple[nn.Module | ResolvedModel, Any | None]:
    """Resolve the model without reading weights, and load its tokenizer unless one is given. Raises ModelError."""
    if isinstance(source, nn.Module):
        return source, tokenizer
    resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
    return resolved, tokenizer if tokenizer is not None else load_tokenizer(resolved)


def open_model(
    source: str | Path | nn.Module | ResolvedModel,
    options: RunOptions,
    tokenizer: Any | None = None,
    *,
    computes_in_dtype: bool = False,
    fresh: Callable[[], nn.Module] | None = None,
    skeleton: nn.Module | None = None,
) -> LoadedModel:
    """Load the model `source`, or use a loaded model (which is never changed).

    computes_in_dtype: whether `options.dtype` is the compute type, for commands that write nothing. fresh, skeleton: as
    in `LoadedModel`, for weights that stay in their files.

    A model that was resolved before keeps its own revision and permission to run code, whatever `options` say.
    Raises ModelError for an invalid model, if possible before weights are read.
    """
    if isinstance(source, nn.Module):
        require_values(source)
        ref = model_ref(source, type(source).__name__, None)
        written = pick_dtype(options.dtype, source=next(source.parameters()).dtype)
        return LoadedModel(model=computable(source), tokenizer=tokenizer, ref=ref, dtype=written, owned=False)
    resolved = source
    if not isinstance(resolved, ResolvedModel):
        resolved = resolve_model(resolved, revision=options.revision, trust_remote_code=options.trust_remote_code)
    device, written = pick_device(options.device), pick_dtype(options.dtype, source=resolved.dtype)
    dtype = written if computes_in_dtype and options.dtype != "auto" else None
    opened = fresh or partial(load_model, resolved, device=device, dtype=dtype, device_map=options.device_map)
    model = opened()
    return LoadedModel(
        model=model, tokenizer=tokenizer if tokenizer is not None else load_tokenizer(resolved),
        ref=model_ref(model, resolved.source, resolved.revision), dtype=written, owned=True, folder=resolved.folder,
        fresh=fresh, skeleton=skeleton, quantisation=resolved.quantisation,
        trust_remote_code=resolved.trust_remote_code,
    )  # fmt: skip
