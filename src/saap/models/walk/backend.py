"""A model and the means to run it: what every stage needs of the machine, in one value."""

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
    """A model, its graph, and how to run it; where its weights are, the model itself says.

    processes: each takes a part of the samples, and all get the whole result. spill: where the activations between two
    blocks are kept. With it all samples walk one block at a time, so that weights in files are read once a pass;
    without it each micro-batch walks through all blocks by itself. products: the type in which blocks multiply
    matrices, None for that of the weights. progress: called with the steps done and all steps of this process.
    """

    model: nn.Module
    graph: ModelGraph
    processes: Processes = field(default_factory=Processes)
    spill: Spill | None = None
    products: torch.dtype | None = None
    progress: Progress = silent

    @property
    def device(self) -> torch.device:
        """Where the model begins."""
        return next(self.model.parameters()).device

    @property
    def keep(self) -> Keep:
        """Keeps activations where there is room for them."""
        return PackedTensors if self.spill is None else self.spill.keep

    def walker(self) -> BlockWalker:
        """A new walker over the model's blocks."""
        return BlockWalker(self.model, self.graph.blocks, products=self.products)
