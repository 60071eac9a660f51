"""The state of a training on disk: enough to go on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from saap.core.errors import StaleInputError
from saap.models.checkpoint.safetensor_files import TensorEntry, write_tensors

STATE, BEST = "state.safetensors", "best.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPoint:
    """One step. loss: mean over its learned tokens. validation: -log p over the held examples, where it was measured.

    tokens, seconds: so far. rate: learning rate of the step.
    """

    step: int
    tokens: int
    loss: float
    rate: float
    seconds: float
    validation: float | None = None


@dataclass(slots=True)
class Progress:
    """Where a training is. best_step: whose parameters are the best so far, 0 those before the first step."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_validation: float = float("nan")
    best_validation: float = float("inf")
    best_step: int = 0
    without_best: int = 0
    points: list[LossPoint] = field(default_factory=list)


def save_parameters(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Write the trained parameters alone."""
    write_tensors(path, {name: TensorEntry.of(value.detach()) for name, value in parameters.items()}, {"format": "pt"})


def load_parameters(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Read what `save_parameters` wrote into the parameters, in place. Raises StaleInputError."""
    _read(path, {name: value.data for name, value in parameters.items()})


def save_state(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write parameters, the optimizer's moments and the progress, whole or not at all."""
    tensors = {name: value.detach() for name, value in parameters.items()}
    steps = 0
    for name, value in parameters.items():
        moments = optimizer.state[value]
        tensors |= {f"{name}/{moment}": moments[moment] for moment in _MOMENTS}
        steps = int(moments["step"])
    entries = {name: TensorEntry.of(value) for name, value in tensors.items()}
    record = {"optimizer_steps": steps, "progress": dataclasses.asdict(progress)}
    write_tensors(path, entries, {"format": "pt", "saap": json.dumps(record)})


def load_state(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress | None:
    """Go back to a saved state; None if there is none. Raises StaleInputError if the file is of something else."""
    if not path.is_file():
        return None
    targets = {name: value.data for name, value in parameters.items()}
    for name, value in parameters.items():
        optimizer.state[value] = {moment: torch.zeros_like(value) for moment in _MOMENTS}
        targets |= {f"{name}/{moment}": optimizer.state[value][moment] for moment in _MOMENTS}
    record = json.loads(_read(path, targets)["saap"])
    for value in parameters.values():
        optimizer.state[value]["step"] = torch.tensor(float(record["optimizer_steps"]))
    saved = record["progress"]
    return Progress(**{**saved, "points": [LossPoint(**point) for point in saved["points"]]})


def _read(path: Path, targets: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(targets):
                raise ValueError("it is of other parameters")
            for name, target in targets.items():
                target.copy_(file.get_tensor(name))
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise StaleInputError(f"{path} is no state of this training ({error})", "Delete it") from None
