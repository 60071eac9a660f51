"""Backend: a model with everything that a stage needs to run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from saap.core.records import ModelGraph
from saap.models.walk.processes import Processes
from saap.models.walk.spill import Keep, PackedTensors, Spill
from saap.models.walk.walker import BlockWalker

Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A model, its graph, and how to run it; the model itself knows where its weights are.

    processes: each processes a part of the samples, and all get the whole result. spill: storage of activations between
    two blocks. With it, all samples pass one block at a time, so offloaded weights are read once per pass; without it,
    each micro-batch passes all blocks separately. products: the type of matrix products in blocks, None for that of the
    weights. progress: called with the finished and all steps of this process.
    """

    model: nn.Module
    graph: ModelGraph
    processes: Processes = field(default_factory=Processes)
    spill: Spill | None = None
    products: torch.dtype | None = None
    progress: Progress = silent

    @property
    def device(self) -> torch.device:
        """Device of the model's input."""
        return next(self.model.parameters()).device

    @property
    def keep(self) -> Keep:
        """Storage for activations."""
        return PackedTensors if self.spill is None else self.spill.keep

    def walker(self) -> BlockWalker:
        """A new walker over the model's blocks."""
        return BlockWalker(self.model, self.graph.blocks, products=self.products)
