"""Many batches in one walk over the blocks: each block is used for all of them before the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from saap.models.walk.spill import NewTensors, Spill, Tensors, held
from saap.models.walk.walker import BlockWalker, Contexts, Stream


def started(walker: BlockWalker, batches: Iterable[Tensor], new: NewTensors) -> tuple[Tensors, list[Contexts]]:
    """What goes into the first block for each batch of ids (sequences, tokens), kept by `new`, and the contexts."""
    hidden, contexts = new(), []
    for batch in batches:
        stream = walker.start(batch)
        hidden.append(stream.hidden)
        contexts.append(stream.contexts)
    return hidden, contexts


def inputs_of_blocks(walker: BlockWalker, stream: Stream) -> tuple[list[Tensor], Tensor]:
    """What goes into each block, and what the last one puts out."""
    inputs, hidden = [], stream.hidden
    for layer in range(len(walker.paths)):
        inputs.append(hidden)
        hidden = walker.run_block(layer, hidden, stream.contexts)
    return inputs, hidden


def passed(walker: BlockWalker, layer: int, hidden: Tensors, contexts: Sequence[Contexts], new: NewTensors) -> Tensors:
    """What a block makes of the hidden states of each batch, kept by `new`."""
    both = zip(hidden, contexts, strict=True)
    return held(new, (walker.run_block(layer, one, context) for one, context in both))


@torch.no_grad()
def walked_logits(model: nn.Module, blocks: Sequence[str], batches: Sequence[Tensor], spill: Spill) -> Iterator[Tensor]:
    """Logits (sequences, tokens, vocabulary) of each batch of ids (sequences, tokens), in order.

    blocks: paths of the decoder blocks. spill: keeps the hidden states between two blocks.
    """
    walker = BlockWalker(model, blocks)
    hidden, contexts = started(walker, batches, spill.empty)
    for layer in range(len(blocks)):
        hidden = passed(walker, layer, hidden, contexts, spill.empty)
    for last in hidden:
        with torch.no_grad():
            yield walker.logits(last)
