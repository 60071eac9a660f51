"""Memory of activations that are kept for a backward pass instead of computed again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from saap.models.loading import memory
from saap.models.walk.walker import BlockWalker, Stream

LARGEST_SHARE = 0.25
"""Of the free memory, above which activations are recomputed."""


def most_kept(walker: BlockWalker, processes: int) -> float:
    """Bytes of activations that each of some processes may keep: what fits on each device of the blocks.

    Processes on CPUs share the memory of one machine at worst.
    """
    devices = {one.device for block in walker.blocks for one in block.parameters()}
    free = [memory.free(device) / (processes if device.type == "cpu" else 1) for device in devices]
    return LARGEST_SHARE * min(free, default=0.0)


def kept_bytes(walker: BlockWalker, stream: Stream, run: Callable[[int, Tensor], Tensor] | None = None) -> int:
    """Bytes of the activations that a backward pass through all blocks needs; those of one block exist at a time.

    run: gives the output of block `index` for its input, if the walker alone does not run what will be trained.
    """
    weights = {id(one) for one in (*walker.model.parameters(), *walker.model.buffers())}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        kept[id(whole)] = whole
        return tensor

    hidden, total = stream.hidden, 0
    for layer in range(len(walker.blocks)):
        with torch.enable_grad(), saved_tensors_hooks(note, lambda tensor: tensor):
            entry = hidden.detach().requires_grad_()
            output = walker.run_block(layer, entry, stream.contexts) if run is None else run(layer, entry)
        total += sum(one.nbytes for number, one in kept.items() if number not in weights)
        hidden = output.detach()
        kept.clear()
    return total
