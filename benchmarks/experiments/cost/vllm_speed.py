"""Tokens per second in vLLM: pruned in the Transformers backend, dense there and in vLLM's own class."""

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from harness.experiment import Cells, Measured, Names, Request, Values
from lab.commands import quickly_pruned
from lab.dense import model_in
from lab.vllm_runs import script, vllm_python

from saap.models.checkpoint.safetensor_files import StoredTensors, weight_files

CELLS = ["1", "32"]
"""Sequences at once."""
PROMPT, TOKENS, ROUNDS = 32, 64, 5
OPTIONS = {"python": "PATH"}
SMOKE = False
SETTINGS = {
    "dense": "{model}", "dtype": "float32", "prompt tokens": PROMPT, "tokens written": TOKENS, "rounds": ROUNDS,
}  # fmt: skip
MODELS = {"native": ("dense", "vllm"), "dense": ("dense", "transformers"), "pruned": ("pruned", "transformers")}
"""Folder and model implementation."""
DENSE = ("native", "dense")


def measure(request: Request, wanted: Names) -> Measured:
    """The three models wait in a process each and are asked in turn, so that all have the machine's same load."""
    pruned, dense = quickly_pruned(request, "adaptive", "0.2"), request.work / "vllm" / "dense"
    model: Any = model_in(request.model)
    if not dense.is_dir():
        model.save_pretrained(dense)
    folders = {"dense": dense, "pruned": pruned}
    sizes = {name: weights_of(folder) for name, folder in folders.items()}
    python = vllm_python(request)
    for cell in wanted:
        with ExitStack() as stack:
            models = {
                name: stack.enter_context(timed(python, folders[folder], implementation))
                for name, (folder, implementation) in MODELS.items()
            }
            for one in models.values():
                one(int(cell))  # warm
            rounds = [{name: one(int(cell)) for name, one in models.items()} for _ in range(ROUNDS)]
        speeds = {name: statistics.median(round_[name] for round_ in rounds) for name in MODELS}
        over = {name: statistics.median(round_["pruned"] / round_[name] for round_ in rounds) for name in DENSE}
        yield cell, {"tokens_per_second": speeds, "pruned_over": over, "size_ratio": sizes["dense"] / sizes["pruned"]}


@contextmanager
def timed(python: str, folder: Path, implementation: str) -> Iterator[Callable[[int], float]]:
    """Tokens per second for so many sequences at once, by a model that stays loaded."""
    with script(python, "vllm_speed_worker.py", folder, implementation, PROMPT) as started:
        started.line("@ready")

        def speed(sequences: int) -> float:
            started.send(f"{sequences} {TOKENS}")
            return sequences * TOKENS / float(started.line("@took").split()[1])

        yield speed


def weights_of(folder: Path) -> int:
    """Stored numbers: what is read for each token, and half of its multiplications and additions (tied embeddings)."""
    shapes = StoredTensors.in_files(weight_files(folder)).shapes.values()
    return sum(math.prod(shape) for shape in shapes)


def summarise(cells: Cells) -> Values:
    over_size = {name: cell["pruned_over"]["dense"] / cell["size_ratio"] for name, cell in cells.items()}
    rows = {name: {**cell, "over_size": over_size[name]} for name, cell in cells.items()}
    return {"rows": rows, "one": rows["1"], "many": rows["32"], "size_ratio": rows["1"]["size_ratio"]}
