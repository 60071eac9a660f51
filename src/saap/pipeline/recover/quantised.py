"""The quantised model of a recovery, by rounding while its files are read, or by GPTQ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.errors import ModelError
from saap.discovery.blocks import find_blocks
from saap.models.checkpoint.groupwise import PACKED_FILE, GroupwiseLinear, linears_inside, read_packed, write_packed
from saap.models.loading.pretrained import load_groupwise, load_model, model_without_weights
from saap.pipeline.recover.context import Recovery
from saap.pipeline.recover.teacher import check_fits
from saap.recovery.quantise import check_group_sizes, quantise, quantise_by_feedback
from saap.recovery.sharding import check_shardable
from saap.settings.recover import RecoverConfig, Tuning

FEEDBACK_TOKENS = 8192
"""Of the data that GPTQ reads, at least: with fewer tokens than inputs it does no better than rounding."""


def check_layers(run: Recovery) -> None:
    """Raise SaapError if the settings do not fit the layers to quantise. No weights are read."""
    if run.config.tuning is Tuning.GROUPWISE:
        layers_to_quantise(run.config, model_without_weights(run.resolved))


def layers_to_quantise(config: RecoverConfig, model: nn.Module) -> Sequence[str]:
    """The linear layers of the blocks. Raises SaapError if the settings do not fit them."""
    sizes = linears_of(model)
    if not sizes:
        raise without_linears(model)
    check_group_sizes(sizes, config.group_size)
    if config.shard:
        check_shardable(model, sizes)
    return tuple(sizes)


def linears_of(model: nn.Module) -> dict[str, int]:
    """Path and input size of the linear layers in the decoder blocks."""
    return linears_inside(model, find_blocks(model))


def without_linears(model: nn.Module) -> ModelError:
    """The error for a model without linear layers in its blocks."""
    return ModelError(
        f"{type(model).__name__} has no linear layers in its blocks", "Use --tuning full, or another model"
    )


def quantised_model(run: Recovery, folder: Path) -> Any:
    """The model with packed weights. folder: where those of GPTQ stay for a resumed run. Raises SaapError.

    Codes of GPTQ depend on rounding, so one process computes them for all, once.
    """
    config = run.config
    fitting = partial(layers_to_quantise, config)
    if config.error_feedback:
        run.processes.broadcast_result(lambda: _write_codes(run, folder))
        packed = read_packed(folder)
        return load_groupwise(run.resolved, fitting, lambda path, _: packed[path], device=run.device)
    sizes = {"group_size": config.group_size, "bits": config.bits}
    return load_groupwise(run.resolved, fitting, lambda _, read: quantise(read(), **sizes), device=run.device)


def _write_codes(run: Recovery, folder: Path) -> None:
    file = folder / "saap" / PACKED_FILE
    if file.is_file():
        return
    model, config = load_model(run.resolved, device=run.device), run.config
    check_fits(run, model)
    quantise_by_feedback(
        model, find_blocks(model), list(_samples(run)), group_size=config.group_size, bits=config.bits,
        progress=run.meter.reporter.advance,
    )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, GroupwiseLinear)}
    write_packed(file, {path: layer.quantised for path, layer in layers.items()})


def _samples(run: Recovery) -> Iterator[Tensor]:
    """Ids (1, length) of the first sequences of the data."""
    tokens = 0
    for one in run.data.train:
        if tokens >= FEEDBACK_TOKENS:
            return
        tokens += len(one.tokens)
        yield torch.from_numpy(one.tokens).to(run.device)[None]
