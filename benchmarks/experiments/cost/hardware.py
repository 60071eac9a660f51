"""Memory that a run needs by model size, from the formulas of the forecast; no weights are read."""

from typing import Any

import torch
from harness.experiment import Cells, Measured, Names, Request, Values
from lab.checkpoints import SHAPES, experts_30b, llama, skeleton

from saap.pipeline.shared.memory_estimate import Needs, Sizes
from saap.pipeline.shared.memory_limit import RESERVE_BYTES
from saap.settings.prune import PruneConfig

MODELS = {
    "SmolLM2-135M": llama(576, 1536, 30, 9, 49152, keys=3, tied=True),
    "Qwen2.5-0.5B": llama(896, 4864, 24, 14, 151936, keys=2, tied=True),
    "Qwen2.5-1.5B": SHAPES["1.5b"],
    "LLaMA-7B": SHAPES["7b"],
    "Mistral-7B": llama(4096, 14336, 32, 32, 32000, keys=8),
    "Qwen2.5-7B": llama(3584, 18944, 28, 28, 152064, keys=4),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 128256, keys=8),
    "Qwen3-8B": llama(4096, 12288, 36, 32, 151936, keys=8),
    "LLaMA-13B": SHAPES["13b"],
    "Qwen3-30B-A3B": experts_30b(48),
    "Qwen2.5-32B": llama(5120, 27648, 64, 40, 152064, keys=8),
    "Llama-3-70B": llama(8192, 28672, 80, 64, 128256, keys=8),
}
"""Shapes of these models; only their sizes matter."""
SHOWN = ["SmolLM2-135M", "Qwen2.5-1.5B", "Llama-3.1-8B", "Qwen3-30B-A3B", "Llama-3-70B"]
"""In the README."""
CARD_BYTES = 24e9
RUNS: dict[str, dict[str, Any]] = {
    "fast": {"preset": "fast"}, "default": {}, "cut only": {"preset": "fast", "restore": False},
}  # fmt: skip
DEVICES = {"cpu": torch.float32, "cuda": torch.bfloat16}
"""What a run computes in on each of them."""
CELLS = list(MODELS)
DECIDED_BY = ("pipeline/shared/memory_estimate.py", "settings/prune.py")


def measure(request: Request, wanted: Names) -> Measured:
    for name in wanted:
        yield name, values_of(name)


def values_of(name: str) -> Values:
    """Parameters, and bytes of each run on each device: all in memory, with activations or with blocks offloaded."""
    model = skeleton(MODELS[name])
    parameters = list(model.parameters())
    needs: dict[str, dict[str, Values]] = {}
    for device, dtype in DEVICES.items():
        sizes = Sizes.of(model.to(dtype), torch.device(device))
        needs[device] = {}
        for run, settings in RUNS.items():
            found = Needs.of(sizes, PruneConfig(pruning_ratios=(0.2,), **settings))
            needs[device][run] = {field: RESERVE_BYTES + value for field, value in found._asdict().items()}
    count = sum(parameter.numel() for parameter in parameters)
    return {"parameters": count, "stored_bytes": 2 * count, "needs": needs}


def summarise(cells: Cells) -> Values:
    rows = {name: cells[name] for name in CELLS if name in cells}
    largest = max(rows.values(), key=lambda row: float(row["parameters"]))
    needs, card = [row["needs"]["cuda"]["default"] for row in rows.values()], largest["needs"]["cuda"]
    return {
        "rows": rows, "shown": SHOWN, "card": CARD_BYTES / 1e9, "sizes": len(rows),
        "fits": {state: sum(need[state] <= CARD_BYTES for need in needs) for state in ("spilled", "offloaded")},
        "largest": largest["parameters"] / 1e9,
        "least": {run: card[run]["offloaded"] / 1e9 for run in ("default", "cut only")},
    }  # fmt: skip
