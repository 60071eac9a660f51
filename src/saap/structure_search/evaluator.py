"""Structures evaluated by what they do: the loss on held-out calibration samples, without any surgery."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from itertools import zip_longest

import torch
from torch import Tensor

from saap.models.structure.keep_index import KeepIndex
from saap.models.structure.least_squares import compensated
from saap.models.structure.linear import weight_out_in
from saap.models.structure.masking import masked, replaced_weights
from saap.models.walk.backend import Backend

CACHED_WEIGHTS_BYTES = 2 * 10**9
EVALUATED_AT_ONCE = 8

_Structure = tuple[dict[str, tuple[int, ...]], tuple[int, ...]]


class StructureEvaluator:
    """KL divergence from the dense model's next-token distribution to the pruned one's, in nats per token.

    tokens: (sequences, length) ids that nothing was scored on. A removed unit is masked, which equals cutting it. Where
    `grams` has a Gram matrix of a group's consumer inputs, the consumer also compensates for the tokens as weighted
    there, so that a structure is evaluated by about what the reconstruction will leave of its loss.
    ignored: ids whose prediction does not count.
    """

    def __init__(
        self,
        backend: Backend,
        tokens: Tensor,
        grams: Mapping[str, Tensor] | None = None,
        micro_batch: int = EVALUATED_AT_ONCE,
        *,
        ignored: Collection[int] = (),
    ) -> None:
        self._model, self._graph, self._processes = backend.model, backend.graph, backend.processes
        self._walker = backend.walker()
        self._units = {group.name: group.units for group in backend.graph.groups}
        self._grams = grams or {}
        counted = _counted(tokens, ignored)
        self._predictions = int(counted.sum())
        # Whole micro-batches go to a process, so that the losses do not depend on how many there are.
        own = slice(self._processes.rank, None, self._processes.count)
        self._batches, self._counted = (torch.split(one, micro_batch)[own] for one in (tokens, counted))
        self._dense = self._last_hidden()
        self._weights: OrderedDict[tuple[str, tuple[int, ...]], Tensor] = OrderedDict()

    def __call__(self, keep: Mapping[str, tuple[int, ...]], dropped_blocks: tuple[int, ...] = ()) -> float:
        """Loss of the structure that keeps the units in `keep`. The first process calls, the others serve."""
        self._broadcast((dict(keep), dropped_blocks))
        return self._loss(keep, dropped_blocks)

    def serve(self) -> None:
        """Take part in every evaluation of the first process, until it is done."""
        while (structure := self._broadcast(None)) is not None:
            self._loss(*structure)

    def done(self) -> None:
        """Let those that serve continue."""
        self._broadcast(None)

    def _broadcast(self, structure: _Structure | None) -> _Structure | None:
        return self._processes.broadcast_result(lambda: structure)

    @torch.no_grad()
    def _loss(self, keep: Mapping[str, tuple[int, ...]], dropped_blocks: tuple[int, ...]) -> float:
        losing = {name: kept for name, kept in keep.items() if len(kept) < self._units[name]}
        others = {name: kept for name, kept in losing.items() if name not in self._grams}
        weights = {self._path(name): self._weight(name, kept) for name, kept in losing.items() if name in self._grams}
        with (
            replaced_weights(self._model, weights),
            masked(self._model, self._graph, others, dropped_blocks),  # hidden channels in the others' place too
        ):
            changed = self._last_hidden()
        rows = [
            [self._row_divergence(*row) for row in zip(*batch, strict=True)]
            for batch in zip(self._dense, changed, self._counted, strict=True)
        ]
        every = self._processes.gather(rows)
        batches = [batch for turn in zip_longest(*every, fillvalue=[]) for batch in turn]
        return sum(value for batch in batches for value in batch) / self._predictions

    def _row_divergence(self, dense: Tensor, hidden: Tensor, counted: Tensor) -> float:
        """dense, hidden: (length, width). counted: (length,) bool."""
        counted, hidden = counted.to(dense.device), hidden.to(dense.device)
        return _divergence(self._walker.logits(dense[counted][None]), self._walker.logits(hidden[counted][None]))

    def _path(self, name: str) -> str:
        return self._graph.group(name).consumers[0].tensor.rpartition(".")[0]

    def _weight(self, name: str, kept: tuple[int, ...]) -> Tensor:
        """The consumer's compensated weight; the last ones are remembered, candidates share most of them."""
        key = (name, kept)
        if key not in self._weights:
            weight = weight_out_in(self._model.get_submodule(self._path(name))).detach()
            consumer = self._graph.group(name).consumers[0]
            columns = KeepIndex.of(self._graph, {name: kept})[consumer.tensor][consumer.axis].kept()
            self._weights[key] = compensated(weight, self._grams[name], torch.from_numpy(columns).to(weight.device))
        self._weights.move_to_end(key)
        while sum(w.numel() * w.element_size() for w in self._weights.values()) > CACHED_WEIGHTS_BYTES:
            self._weights.popitem(last=False)
        return self._weights[key]

    @torch.no_grad()
    def _last_hidden(self) -> list[Tensor]:
        """The last block's output for each micro-batch."""
        return [self._walker.run_blocks(self._walker.start(batch)) for batch in self._batches]


def _counted(tokens: Tensor, ignored: Collection[int]) -> Tensor:
    """Positions whose next token is not among `ignored` (places of an image): (sequences, length) bool."""
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, :-1] = ~torch.isin(tokens[:, 1:], torch.tensor(list(ignored), dtype=torch.long, device=tokens.device))
    return counted


def _divergence(dense: Tensor, pruned: Tensor) -> float:
    """Sum over tokens of KL(dense || pruned). Both (1, tokens, vocabulary) logits."""
    dense, pruned = dense.float().log_softmax(-1), pruned.float().log_softmax(-1)
    return float(torch.nn.functional.kl_div(pruned, dense, log_target=True, reduction="sum"))
