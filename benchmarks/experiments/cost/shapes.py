"""Pruning checkpoints of the shapes of LLaMA-7B and LLaMA-13B, with random weights, on this machine.

What the model computes is of no interest here: only whether it fits, and how long it takes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.checkpoints import SHAPES, Shape, byte_tokenizer, write_checkpoint
from lab.commands import peak_of, timed_saap

from saap.models.loading.pretrained import open_skeleton
from saap.models.loading.references import resolve_model

FLAGS = [
    "--pruning-ratio", "0.2", "--samples", "10", "--sample-length", "64", "--effort", "fast", "--no-restore",
    "--max-memory", "6GB",
]  # fmt: skip
SPARE_BYTES = 2 * 10**9


def needed_bytes(shape: Shape) -> int:
    """The checkpoint, the cut blocks in the work folder, and the result."""
    dense = 2 * shape.parameters
    left = dense - round(0.2 * 2 * shape.layers * shape.block_parameters)
    return dense + 2 * left


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    folder = Path(request.given.get("folder", tempfile.gettempdir()))
    for cell in wanted:
        yield cell, prune(SHAPES[cell], folder)


def prune(shape: Shape, folder: Path) -> Values:
    """Write the checkpoint, prune it in a process of its own, open the result without its weights, delete both."""
    needed, free = needed_bytes(shape) + SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(
            f"{folder} needs {needed / 1e9:.1f} GB for this shape, but has {free / 1e9:.1f} GB free: "
            f"{(needed - free) / 1e9:.1f} GB are missing. Use --set folder=DIR."
        )
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        source, out = Path(inside) / "dense", Path(inside) / "pruned"
        source.mkdir()
        start = time.perf_counter()
        write_checkpoint(shape, source)
        byte_tokenizer().save_pretrained(source)
        written, load = time.perf_counter() - start, os.getloadavg()[0]
        report, seconds, used = timed_saap("prune", source, *FLAGS, "--out", out)
        open_skeleton(resolve_model(out), torch.bfloat16)  # every weight is there, in the size that its model has
        result_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {
        "layers": shape.layers,
        "parameters": shape.parameters,
        "removed_share_of_blocks": report["pruning_ratio"],
        "seconds": seconds,
        "processor_seconds": used,
        "checkpoint_seconds": written,
        "peak_resident_bytes": peak_of(report),
        "result_bytes": result_bytes,
        "stages": report["stages"],
        "loads": [load, os.getloadavg()[0]],
    }


def summarise(cells: Cells) -> dict[str, Any]:
    rows = {name: cells[name] for name in sorted(cells)}
    largest = max(rows.values(), key=lambda row: float(row["parameters"]))
    return {"rows": rows, "parameters": largest["parameters"] / 1e9, "memory": largest["peak_resident_bytes"] / 1e9,
            "minutes": largest["processor_seconds"] / 60}  # fmt: skip


EXPERIMENT = Experiment(
    name="shapes", cells=lambda request: ["7b", "13b"], settings=lambda request: {"flags": " ".join(FLAGS)},
    measure=measure, summarise=summarise, options={"folder": "DIR"}, smoke=False,
)  # fmt: skip
