"""Whole experts of layers as in Qwen3-30B-A3B with random weights: memory and time by the number of layers."""

import math

from harness.experiment import Cells, Measured, Names, Request, Values
from lab.checkpoints import cost_of_pruning, experts_30b

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
    for layers in wanted:
        yield layers, cost_of_pruning(experts_30b(int(layers)), FLAGS)


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
