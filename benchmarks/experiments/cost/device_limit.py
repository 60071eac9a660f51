"""Four layers of LLaMA-7B on a simulated accelerator with limited memory; all 32 by the formula.

The simulated device (tests/pretend.py) tracks its memory and rejects more than its limit. Activations of the
reconstruction are offloaded, so the peak depends on the micro-batch, not on the number of tokens.
"""

import copy
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness.experiment import Cells, Measured, Names, Request, Values
from lab.checkpoints import SHAPES, parameters_of, skeleton, write_checkpoint
from transformers import LlamaConfig

from saap.models.loading import devices, memory
from saap.pipeline.prune.run import run_prune
from saap.pipeline.shared import memory_estimate, memory_limit
from saap.pipeline.shared import tokens as token_sets
from saap.pipeline.shared.inputs import RunOptions
from saap.settings.presets import Preset
from saap.settings.prune import PruneConfig

LAYERS, CARD, MEASURED_TOKENS, REFIT_TOKENS = 4, 24 * 10**9, 1024, 4096
CELLS = ["device-limit"]
OWN_FILES = True
SMOKE = False


def layers_of_7b(layers: int) -> LlamaConfig:
    shape = copy.deepcopy(SHAPES["7b"])
    shape.num_hidden_layers = layers
    return shape


def needs(layers: int, config: PruneConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Estimated bytes of LLaMA-7B with this number of layers, by what stays on the device."""
    sizes = memory_estimate.Sizes.of(skeleton(layers_of_7b(layers)).to(dtype), torch.device("cuda"))
    found = memory_estimate.Needs.of(sizes, config)
    return {"weights and activations": found.resident, "weights": found.spilled, "one block": found.offloaded}


def measured(folder: Path, config: PruneConfig, limit: int) -> Values:
    source = write_checkpoint(layers_of_7b(LAYERS), folder / "dense")
    pretend = import_module("tests.pretend")  # part of the tests, which are not typed
    with (
        mock.patch.object(devices, "_available", return_value={"lazy": True}),
        mock.patch.object(token_sets, "EVALUATION_TOKENS", MEASURED_TOKENS),
        mock.patch.object(memory, "of_device", return_value=limit),
        pretend.pretended_devices(float64=True, limit=limit) as card,
    ):
        (result,) = run_prune(source, config, RunOptions(out=folder / "out"))
        stages = [stage.name for stage in result.report.stages]
        return {"peak": card.peak, "pruning_ratio": result.report.pruning_ratio, "stages": stages}


def measure(request: Request, wanted: Names) -> Measured:
    small: dict[str, Any] = {"refit_tokens": REFIT_TOKENS, "samples": 4, "sample_length": 64}
    tried, default = PruneConfig(pruning_ratios=(0.2,), preset=Preset.FAST, **small), PruneConfig(pruning_ratios=(0.2,))
    limit = CARD - 2 * (parameters_of(SHAPES["7b"]) - parameters_of(layers_of_7b(LAYERS)))
    found = measured(request.work / "device-limit", tried, limit)
    yield "device-limit", {
        "layers": LAYERS, "refit_tokens": REFIT_TOKENS, "limit": limit, **found,
        "formula": {
            "that run": needs(LAYERS, tried, torch.float32),
            **{f"{layers} layers, bfloat16, effort default": needs(layers, default) for layers in (LAYERS, 32)},
        },
        "reserve": memory_limit.RESERVE_BYTES, "torch": torch.__version__,
    }  # fmt: skip


def summarise(cells: Cells) -> Values:
    found = cells["device-limit"]
    return {**found, "peak_gb": found["peak"] / 1e9, "limit_gb": found["limit"] / 1e9}
