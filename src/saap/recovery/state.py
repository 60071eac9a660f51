"""The state of a training on disk: enough to resume as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from saap.core.errors import StaleInputError
from saap.core.manifest import CurvePoint
from saap.models.checkpoint.safetensor_files import TensorEntry, write_tensors


class Training(BaseModel):
    """What a training has done so far.

    validation: of the best parameters so far, those after `best_step` (0: before the first step). without_best:
    validations since then. stopped_by: what ended the training, in words; '' while it runs.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    validation_before: float = float("inf")
    validation: float = float("inf")
    best_step: int = 0
    without_best: int = 0
    points: list[CurvePoint] = []
    stopped_by: str = ""


def optimizer_tensors(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of the optimizer by name, which it updates in place; zero before its first step."""
    for value in parameters.values():
        moments = {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
        optimizer.state[value] = {"step": torch.zeros(()), **moments}
    return {
        f"{name}/{key}": tensor for name, value in parameters.items() for key, tensor in optimizer.state[value].items()
    }


def write_state(path: Path, tensors: Mapping[str, Tensor], training: Training) -> None:
    """Write tensors and the training they belong to, whole or not at all. Raises OutputError."""
    entries = {name: TensorEntry.of(tensor) for name, tensor in tensors.items()}
    write_tensors(path, entries, {"format": "pt", "training": training.model_dump_json()})


@torch.no_grad()
def read_state(path: Path, tensors: Mapping[str, Tensor]) -> Training:
    """Read what `write_state` wrote into the tensors, in place. Raises StaleInputError for a file of something else."""
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(tensors):
                raise ValueError("it is of other parameters")
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
            return Training.model_validate_json((file.metadata() or {}).get("training", ""))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise StaleInputError(f"{path} is no state of this training ({error})", "Delete it") from None
