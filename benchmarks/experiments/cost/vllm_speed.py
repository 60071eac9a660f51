"""Tokens per second in vLLM: pruned in the Transformers backend, dense there and in vLLM's own class."""

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from harness.experiment import Cells, Measured, Names, Request, Values
from lab.commands import made_by_saap
from lab.dense import model_in, source_of
from lab.vllm_runs import script, vllm_python

from saap.models.checkpoint.safetensor_files import StoredTensors, weight_files

SMOLLM2, QWEN = "smollm2", "qwen2.5-coder-0.5b"
AT_ONCE = ("1", "32")
"""Sequences."""
CELLS = [f"{SMOLLM2}/{sequences}" for sequences in AT_ONCE]
EXTRA = [f"{QWEN}/{sequences}" for sequences in AT_ONCE]
PROMPT, TOKENS, ROUNDS = 32, 64, 5
OPTIONS = {"python": "PATH"}
SMOKE = False
SETTINGS = {
    "dtype": "float32", "pruning ratio": 0.2, "preset": "fast", "prompt tokens": PROMPT, "tokens written": TOKENS,
    "rounds": ROUNDS, "reconstruction": f"not of {QWEN}",
}  # fmt: skip
MODELS = {"native": ("dense", "vllm"), "dense": ("dense", "transformers"), "pruned": ("pruned", "transformers")}
"""Folder and model implementation."""
DENSE = ("native", "dense")


def measure(request: Request, wanted: Names) -> Measured:
    """The three models wait in a process each and are asked in turn, so that all have the machine's same load."""
    python, settings = vllm_python(request), request.settings
    for cell in wanted:
        name, _, sequences = cell.partition("/")
        source, dense = source_of(request, name), request.work / "vllm" / name
        flags = ["--pruning-ratio", settings["pruning ratio"], "--preset", settings["preset"]]
        if name == QWEN:  # weights do not change the speed
            flags.append("--no-restore")
        pruned = made_by_saap(request, f"vllm-{name}", "prune", source, *flags)
        if not dense.is_dir():
            model: Any = model_in(source)
            model.save_pretrained(dense)
        folders = {"dense": dense, "pruned": pruned}
        sizes = {kind: weights_of(folder) for kind, folder in folders.items()}
        with ExitStack() as stack:
            models = {
                kind: stack.enter_context(timed(python, folders[folder], implementation))
                for kind, (folder, implementation) in MODELS.items()
            }
            for one in models.values():
                one(int(sequences))  # warm
            rounds = [{kind: one(int(sequences)) for kind, one in models.items()} for _ in range(ROUNDS)]
        speeds = {kind: statistics.median(round_[kind] for round_ in rounds) for kind in MODELS}
        over = {kind: statistics.median(round_["pruned"] / round_[kind] for round_ in rounds) for kind in DENSE}
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
    rows = []
    for cell, found in cells.items():
        model, _, sequences = cell.partition("/")
        over_size = found["pruned_over"]["dense"] / found["size_ratio"]
        rows.append(
            {"model": model, "sequences": sequences, "over_size": over_size, "share": 1 / found["size_ratio"], **found}
        )
    speeds, over_sizes = [row["pruned_over"]["dense"] for row in rows], [row["over_size"] for row in rows]
    extremes = {"least": min(speeds), "most": max(speeds)}
    return {"rows": rows, **extremes, "least_over_size": min(over_sizes), "most_over_size": max(over_sizes)}
