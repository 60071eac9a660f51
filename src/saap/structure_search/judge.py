"""Judging structures by what they do: the loss of the masked model on held-out calibration samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from saap.models.masking import consumer_masks, masked_channels
from saap.models.walker import BlockWalker
from saap.records import ModelGraph


class MaskedJudge:
    """KL divergence from the dense model's next-token distribution to the masked model's, in nats per token.

    tokens: (sequences, length) ids that nothing was scored on. Masked equals cut, so no surgery is needed.
    """

    def __init__(self, model: nn.Module, graph: ModelGraph, tokens: Tensor, micro_batch: int = 8) -> None:
        self._model = model
        self._graph = graph
        self._walker = BlockWalker(model, graph.blocks)
        self._batches = torch.split(tokens, micro_batch)
        self._dense = [self._last_hidden(batch) for batch in self._batches]
        self.evaluations = 0

    @torch.no_grad()
    def __call__(self, keep: Mapping[str, tuple[int, ...]], dropped_blocks: tuple[int, ...] = ()) -> float:
        """Loss of the structure that keeps the units in `keep`."""
        self.evaluations += 1
        skipped = [self._graph.blocks[layer] for layer in dropped_blocks]
        total, tokens = 0.0, 0
        with masked_channels(self._model, consumer_masks(self._graph, keep), skipped):
            for batch, dense in zip(self._batches, self._dense, strict=True):
                hidden = self._last_hidden(batch)
                total += sum(
                    _divergence(self._walker.logits(dense[row : row + 1]), self._walker.logits(hidden[row : row + 1]))
                    for row in range(len(batch))
                )
                tokens += batch.numel()
        return total / tokens

    @torch.no_grad()
    def _last_hidden(self, batch: Tensor) -> Tensor:
        stream = self._walker.start(batch)
        hidden = stream.hidden
        for layer in range(len(self._graph.blocks)):
            hidden = self._walker.run_block(layer, hidden, stream.contexts)
        return hidden


def _divergence(dense: Tensor, pruned: Tensor) -> float:
    """Sum over tokens of KL(dense || pruned). Both (1, tokens, vocabulary) logits."""
    dense, pruned = dense.float().log_softmax(-1), pruned.float().log_softmax(-1)
    return float(torch.nn.functional.kl_div(pruned, dense, log_target=True, reduction="sum"))
