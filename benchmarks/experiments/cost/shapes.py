"""Checkpoints of the shapes of LLaMA-7B and 13B with random weights, for memory and time; TMPDIR needs 70 GB."""

from harness.experiment import Cells, Measured, Names, Request, Values
from lab.checkpoints import SHAPES, cost_of_pruning

FLAGS = [
    "--pruning-ratio", "0.2", "--num-samples", "10", "--sample-length", "64", "--effort", "fast", "--no-restore",
    "--max-memory", "6GB",
]  # fmt: skip
SETTINGS = {"flags": " ".join(FLAGS)}
CELLS = ["7b", "13b"]
SMOKE = False


def measure(request: Request, wanted: Names) -> Measured:
    for name in wanted:
        yield name, cost_of_pruning(SHAPES[name], FLAGS)


def summarise(cells: Cells) -> Values:
    largest = cells["13b"]
    return {
        "rows": {name: cells[name] for name in sorted(cells)}, "parameters": largest["parameters"] / 1e9,
        "memory": largest["peak_resident_bytes"] / 1e9, "minutes": largest["processor_seconds"] / 60,
    }  # fmt: skip
