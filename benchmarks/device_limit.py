"""Restores four layers of LLaMA-7B on a pretended accelerator of limited memory; all 32 by the formula.

    PYTHONPATH=. python benchmarks/device_limit.py [--refit-tokens N] [--folder DIR]    # about half an hour on 2 cores

The pretended device (tests/pretend.py) counts what lies on it and refuses more than its limit: 24 GB less what the
other 28 layers take in bfloat16. The four layers lie there in float32, as a CPU computes. The run has effort `fast`
and few tokens: activations of the restoration are kept elsewhere, so its peak depends on the micro-batch, not on how
many tokens there are. The formula is given for that run and for effort `default`. Writes
benchmarks/results/device-limit.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lab.checkpoints import SHAPES, byte_tokenizer, write_checkpoint

from saap.models.loading import device_memory, devices
from saap.pipeline.prune.run import run_prune
from saap.pipeline.shared import memory, tokens
from saap.pipeline.shared.inputs import RunOptions
from saap.settings.prune import Effort, PruneConfig

RESULT = Path(__file__).resolve().parent / "results" / "device-limit.json"
LAYERS, CARD, MEASURED_TOKENS = 4, 24 * 10**9, 1024


def sizes(layers: int, itemsize: int = 2) -> memory.Sizes:
    """Of LLaMA-7B with so many layers on an accelerator. itemsize: of a weight; 2 is bfloat16."""
    shape = replace(SHAPES["7b"], layers=layers)
    return memory.Sizes(
        weights=itemsize * shape.parameters, block=itemsize * shape.block_parameters,
        around=2 * itemsize * shape.vocabulary * shape.hidden, matrix=itemsize * shape.hidden * shape.ffn,
        widest=shape.ffn, width=shape.hidden, blocks=layers, vocabulary=shape.vocabulary, heads=shape.heads,
        values=layers * shape.block_parameters,
    )  # fmt: skip


def needs(of: memory.Sizes, config: PruneConfig) -> dict[str, int]:
    """Bytes by what is kept on the device."""
    found = memory.Needs.of(of, config)
    return {"weights and activations": found.resident, "weights": found.spilled, "one block": found.offloaded}


def measured(folder: Path, config: PruneConfig, limit: int) -> dict[str, Any]:
    """Peak bytes on the device, over the stages that this process carries out."""
    source = folder / "dense"
    if not (source / "tokenizer.json").exists():
        source.mkdir(parents=True, exist_ok=True)
        write_checkpoint(replace(SHAPES["7b"], layers=LAYERS), source)
        byte_tokenizer().save_pretrained(source)
    pretend = import_module("tests.pretend")  # a part of the tests, which are not typed
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(devices, "_available", return_value={"lazy": True}))
        stack.enter_context(mock.patch.object(tokens, "EVALUATION_TOKENS", MEASURED_TOKENS))
        stack.enter_context(mock.patch.object(device_memory, "of_device", return_value=limit))
        card = stack.enter_context(pretend.pretended_devices(float64=True, limit=limit))
        (result,) = run_prune(source, config, RunOptions(out=folder / "out"))
        stages = [stage.name for stage in result.report.stages]
        return {"peak": card.peak, "pruning_ratio": result.report.pruning_ratio, "stages": stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refit-tokens", type=int, default=4096)
    parser.add_argument(
        "--folder", type=Path, help="of the checkpoint and the run, which goes on there; without it a new one"
    )
    given = parser.parse_args()
    tried = PruneConfig(
        pruning_ratios=(0.2,), effort=Effort.FAST, refit_tokens=given.refit_tokens, samples=4, sample_length=64
    )
    default = PruneConfig(pruning_ratios=(0.2,))
    limit = CARD - (sizes(32).weights - sizes(LAYERS).weights)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(given.folder or Path(folder), tried, limit)
    result = {
        "layers": LAYERS, "refit_tokens": given.refit_tokens, "limit": limit, **found,
        "formula": {
            "that run": needs(sizes(LAYERS, 4), tried),
            "4 layers, bfloat16, effort default": needs(sizes(LAYERS), default),
            "32 layers, bfloat16, effort default": needs(sizes(32), default),
        },
        "reserve": memory.RESERVE_BYTES,
        "torch": torch.__version__,
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
