"""Checkpoints of the shapes of LLaMA-7B and 13B with random weights, for memory and time; TMPDIR needs 70 GB."""

import os
import tempfile
import time
from pathlib import Path

import torch
from harness.experiment import Cells, Measured, Names, Request, Values
from lab.checkpoints import SHAPES, parameters_of, write_checkpoint
from lab.commands import peak_of, timed_saap

from saap.models.loading.pretrained import open_skeleton
from saap.models.loading.references import resolve_model

FLAGS = [
    "--pruning-ratio", "0.2", "--num-samples", "10", "--sample-length", "64", "--effort", "fast", "--no-restore",
    "--max-memory", "6GB",
]  # fmt: skip
SETTINGS = {"flags": " ".join(FLAGS)}
CELLS = ["7b", "13b"]
SMOKE = False


def measure(request: Request, wanted: Names) -> Measured:
    """Write the checkpoint, prune it in a separate process, open the result without its weights, delete both."""
    for name in wanted:
        shape = SHAPES[name]
        with tempfile.TemporaryDirectory() as temporary:
            source, out = Path(temporary) / "dense", Path(temporary) / "pruned"
            start = time.perf_counter()
            write_checkpoint(shape, source)
            written, load = time.perf_counter() - start, os.getloadavg()[0]
            report, seconds, used = timed_saap("prune", source, *FLAGS, "--out", out)
            open_skeleton(resolve_model(out), torch.bfloat16)  # checks that every weight exists in the right size
            result_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        yield name, {
            "layers": shape.num_hidden_layers, "parameters": parameters_of(shape),
            "removed_share_of_blocks": report["pruning_ratio"],
            "seconds": seconds, "processor_seconds": used, "checkpoint_seconds": written,
            "peak_resident_bytes": peak_of(report), "result_bytes": result_bytes, "stages": report["stages"],
            "loads": [load, os.getloadavg()[0]],
        }  # fmt: skip


def summarise(cells: Cells) -> Values:
    largest = cells["13b"]
    return {
        "rows": {name: cells[name] for name in sorted(cells)}, "parameters": largest["parameters"] / 1e9,
        "memory": largest["peak_resident_bytes"] / 1e9, "minutes": largest["processor_seconds"] / 60,
    }  # fmt: skip
