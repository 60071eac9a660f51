"""Whole experts of layers as in Qwen3-30B-A3B with random weights: memory and time by the number of layers."""

import math
import tempfile
from pathlib import Path

from harness.experiment import Cells, Measured, Names, Request, Values
from lab.checkpoints import experts_30b, parameters_of, write_checkpoint
from lab.commands import peak_of, timed_saap

WHOLE = 48
"""Layers of the model."""
FLAGS = [
    "--roles", "expert", "--importance", "reap", "--layout", "uniform", "--no-restore", "--pruning-ratio", "0.25",
    "--num-samples", "16", "--sample-length", "2048", "--preset", "fast", "--max-memory", "10GB",
]  # fmt: skip
SETTINGS = {"flags": " ".join(FLAGS)}
CELLS = ["2", "8"]
SMOKE = False


def measure(request: Request, wanted: Names) -> Measured:
    """Write the checkpoint, prune it in a process of its own, delete both."""
    for layers in wanted:
        with tempfile.TemporaryDirectory() as temporary:
            source, out = Path(temporary) / "dense", Path(temporary) / "pruned"
            write_checkpoint(experts_30b(int(layers)), source)
            report, seconds, used = timed_saap("prune", source, *FLAGS, "--out", out)
            removed = report["pruning_ratio"]
        yield layers, {
            "parameters": parameters_of(experts_30b(int(layers))), "removed_share_of_blocks": removed,
            "seconds": seconds, "processor_seconds": used, "peak_resident_bytes": peak_of(report),
            "stages": report["stages"],
        }  # fmt: skip


def summarise(cells: Cells) -> Values:
    (few, first), *_, (many, last) = sorted(cells.items(), key=lambda one: int(one[0]))
    more = int(many) / int(few)
    layer = (last["processor_seconds"] - first["processor_seconds"]) / (int(many) - int(few))
    return {
        "rows": {name: cells[name] for name in sorted(cells, key=int)},
        "exponent": math.log(last["peak_resident_bytes"] / first["peak_resident_bytes"]) / math.log(more),
        "minutes_of_a_layer": layer / 60, "memory": last["peak_resident_bytes"] / 1e9, "layers": int(many),
        "whole": WHOLE,
        "hours": (last["processor_seconds"] + layer * (WHOLE - int(many))) / 3600,
    }  # fmt: skip
