"""Judging structures by what they do: the loss on held-out calibration samples, without any surgery."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from saap.models.least_squares import compensated
from saap.models.linear import weight_out_in
from saap.models.masking import (
    channel_mask,
    consumer_masks,
    gone_experts,
    masked_channels,
    narrowed,
    never_chosen,
    replaced_weights,
    zeroed_parts,
)
from saap.models.walker import BlockWalker
from saap.records import ModelGraph

CACHED_WEIGHTS_BYTES = 2 * 10**9


class StructureJudge:
    """KL divergence from the dense model's next-token distribution to the pruned one's, in nats per token.

    tokens: (sequences, length) ids that nothing was scored on. A removed unit is masked, which equals cutting it. Where
    `grams` has the Gram matrix of a group's consumer inputs, the consumer also makes good what it can, as restoration
    will, so that a structure is judged by what will be left of its loss.
    ignored: ids whose prediction does not count.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ModelGraph,
        tokens: Tensor,
        grams: Mapping[str, Tensor] | None = None,
        micro_batch: int = 8,
        ignored: Collection[int] = (),
    ) -> None:
        self._model = model
        self._graph = graph
        self._units = {group.name: group.units for group in graph.groups}
        self._grams = grams or {}
        self._walker = BlockWalker(model, graph.blocks)
        self._ignored = torch.tensor(list(ignored), dtype=torch.long, device=tokens.device)
        self._batches = torch.split(tokens, micro_batch)
        self._dense = [self._last_hidden(batch) for batch in self._batches]
        self._weights: OrderedDict[tuple[str, tuple[int, ...]], Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, keep: Mapping[str, tuple[int, ...]], dropped_blocks: tuple[int, ...] = ()) -> float:
        """Loss of the structure that keeps the units in `keep`."""
        skipped = [self._graph.blocks[layer] for layer in dropped_blocks]
        losing = {name: kept for name, kept in keep.items() if len(kept) < self._units[name]}
        masked = {name: kept for name, kept in losing.items() if name not in self._grams}
        weights = {self._path(name): self._weight(name, kept) for name, kept in losing.items() if name in self._grams}
        total = 0.0
        with (
            masked_channels(self._model, consumer_masks(self._graph, masked), skipped),
            zeroed_parts(self._model, self._graph, masked),
            never_chosen(gone_experts(self._model, self._graph, masked)),
            replaced_weights(self._model, weights),
            narrowed(self._model, self._graph, masked),  # also what has just been replaced
        ):
            changed = [self._last_hidden(batch) for batch in self._batches]
        count = 0
        for batch, dense, hidden in zip(self._batches, self._dense, changed, strict=True):
            for row, counted in enumerate(self._counted(batch)):
                count += int(counted.sum())
                before, after = dense[row, counted], hidden[row, counted]
                logits = self._walker.logits(before.unsqueeze(0)), self._walker.logits(after.unsqueeze(0))
                total += _divergence(*logits)
        return total / count

    def _counted(self, batch: Tensor) -> Tensor:
        """Positions whose next token is no place of an image: (sequences, length)."""
        counted = torch.ones_like(batch, dtype=torch.bool)
        counted[:, :-1] = ~torch.isin(batch[:, 1:], self._ignored)
        return counted

    def _path(self, name: str) -> str:
        return self._graph.group(name).consumers[0].tensor.rpartition(".")[0]

    def _weight(self, name: str, kept: tuple[int, ...]) -> Tensor:
        """The consumer's compensated weight; the last ones are remembered, candidates share most of them."""
        key = (name, kept)
        if key not in self._weights:
            weight = weight_out_in(self._model.get_submodule(self._path(name))).detach()
            columns = channel_mask(self._graph.group(name), kept, weight.shape[1]).nonzero().flatten()
            self._weights[key] = compensated(weight, self._grams[name], columns.to(weight.device))
        self._weights.move_to_end(key)
        while sum(w.numel() * w.element_size() for w in self._weights.values()) > CACHED_WEIGHTS_BYTES:
            self._weights.popitem(last=False)
        return self._weights[key]

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
