"""Logits of many batches from one walk over the blocks: each block is used for all of them before the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from saap.models.spill import Spill, held
from saap.models.walker import BlockWalker


@torch.no_grad()
def walked_logits(model: nn.Module, blocks: Sequence[str], batches: Sequence[Tensor], spill: Spill) -> Iterator[Tensor]:
    """Logits (sequences, tokens, vocabulary) of each batch of ids (sequences, tokens), in order.

    blocks: paths of the decoder blocks. spill: keeps the hidden states between two blocks.
    """
    walker, hidden, contexts = BlockWalker(model, blocks), spill.empty(), []
    for batch in batches:
        stream = walker.start(batch)
        hidden.append(stream.hidden)
        contexts.append(stream.contexts)
    for layer in range(len(blocks)):
        passed = (walker.run_block(layer, *both) for both in zip(hidden, contexts, strict=True))
        hidden = held(spill.empty, passed)
    for last in hidden:
        with torch.no_grad():
            yield walker.logits(last)
