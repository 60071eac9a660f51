"""Several processes that train together: each takes a part of every batch, sums make them one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run. accelerator: of the accelerate library, which knows how they were started."""

    accelerator: Any

    @classmethod
    def found(cls, device: torch.device) -> Processes:
        """Those that `accelerate launch` or `torchrun` started, or this one alone."""
        return cls(Accelerator(cpu=device.type == "cpu"))

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """Number of this one, from 0."""
        return int(self.accelerator.process_index)

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return bool(self.accelerator.is_main_process)

    def device(self, chosen: torch.device) -> torch.device:
        """Where this process computes: of several on CUDA each has its own device."""
        return torch.device(self.accelerator.device) if self.count > 1 else chosen

    def total(self, values: Tensor) -> Tensor:
        """Sum of the tensor over all processes, the same in each."""
        return values if self.count == 1 else self.accelerator.reduce(values, reduction="sum")

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()
