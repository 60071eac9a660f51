"""Structures evaluated by what they do: the loss on held-out calibration samples, without any surgery."""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from saap.core.records import FloatArray
from saap.models.structure.keep_index import KeepIndex
from saap.models.structure.least_squares import compensated
from saap.models.structure.linear import weight_out_in
from saap.models.structure.masking import masked, replaced_weights
from saap.models.walk.backend import Backend

CACHED_WEIGHTS_BYTES = 2 * 10**9
EVALUATED_AT_ONCE = 8

_Keep = Mapping[str, tuple[int, ...]]


class StructureEvaluator:
    """KL divergence from the dense model's next-token distribution to the pruned one's, in nats per token.

    tokens: (sequences, length) ids that nothing was scored on. A removed unit is masked, which equals cutting it. Where
    `grams` has a Gram matrix of a group's consumer inputs, the consumer also compensates for the tokens as weighted
    there, so that a structure is evaluated by about what the reconstruction will leave of its loss.
    ignored: ids whose prediction does not count (places of an image).
    """

    def __init__(
        self, backend: Backend, tokens: Tensor, grams: Mapping[str, Tensor] | None = None,
        micro_batch: int = EVALUATED_AT_ONCE, *, ignored: Collection[int] = (),
    ) -> None:  # fmt: skip
        self._model, self._graph, self._processes = backend.model, backend.graph, backend.processes
        self._walker, self._grams = backend.walker(), grams or {}
        self._units = {group.name: group.units for group in backend.graph.groups}
        counted = torch.ones_like(tokens, dtype=torch.bool)
        never = torch.tensor(list(ignored), dtype=torch.long, device=tokens.device)
        counted[:, :-1] = ~torch.isin(tokens[:, 1:], never)
        self._predictions = int(counted.sum())
        # Whole micro-batches go to a process, so that the losses do not depend on how many there are.
        own = slice(self._processes.rank, None, self._processes.count)
        self._batches, self._counted = (torch.split(one, micro_batch)[own] for one in (tokens, counted))
        self._dense = self._last_hidden()
        self._weights: OrderedDict[tuple[str, tuple[int, ...]], Tensor] = OrderedDict()

    def __call__(self, keep: _Keep, dropped_blocks: tuple[int, ...] = ()) -> FloatArray:
        """Losses of the structure that keeps the units in `keep`, (sequences,); their mean is that of a token.

        The first process calls, the others serve.
        """
        self._processes.broadcast_result(lambda: (dict(keep), dropped_blocks))
        return self._losses(keep, dropped_blocks)

    def serve(self) -> None:
        """Take part in every evaluation of the first process, until it is done."""
        nothing: tuple[_Keep, tuple[int, ...]] | None = None
        while (structure := self._processes.broadcast_result(lambda: nothing)) is not None:
            self._losses(*structure)

    def done(self) -> None:
        """Let those that serve continue; compensated weights are of no use to other targets."""
        self._weights.clear()
        self._processes.broadcast_result(lambda: None)

    @torch.no_grad()
    def _losses(self, keep: _Keep, dropped_blocks: tuple[int, ...]) -> FloatArray:
        losing = {name: kept for name, kept in keep.items() if len(kept) < self._units[name]}
        others = {name: kept for name, kept in losing.items() if name not in self._grams}
        weights = dict(self._compensated(name, kept) for name, kept in losing.items() if name in self._grams)
        with (
            replaced_weights(self._model, weights),
            masked(self._model, self._graph, others, dropped_blocks),  # hidden channels in the others' place too
        ):
            changed = self._last_hidden()
        rows = [
            [self._divergence(*row) for row in zip(*batch, strict=True)]
            for batch in zip(self._dense, changed, self._counted, strict=True)
        ]
        every = self._processes.gather(rows)
        batches = [batch for turn in zip_longest(*every, fillvalue=[]) for batch in turn]
        values = np.array([value for batch in batches for value in batch])
        return values * (len(values) / self._predictions)

    def _divergence(self, dense: Tensor, hidden: Tensor, counted: Tensor) -> float:
        """Sum over tokens of KL(dense || pruned). dense, hidden: (length, width). counted: (length,) bool."""
        each = (one[counted.to(one.device)].to(dense.device)[None] for one in (dense, hidden))
        target, found = (self._walker.logits(one).float().log_softmax(-1) for one in each)
        return float(torch.nn.functional.kl_div(found, target, log_target=True, reduction="sum"))

    def _compensated(self, name: str, kept: tuple[int, ...]) -> tuple[str, Tensor]:
        """The consumer's path and compensated weight; the last ones are remembered, candidates share most of them."""
        key, consumer = (name, kept), self._graph.group(name).consumers[0]
        path = consumer.tensor.rpartition(".")[0]
        if key not in self._weights:
            weight = weight_out_in(self._model.get_submodule(path)).detach()
            columns = KeepIndex.of(self._graph, {name: kept})[consumer.tensor][consumer.axis].kept()
            self._weights[key] = compensated(weight, self._grams[name], torch.from_numpy(columns).to(weight.device))
        self._weights.move_to_end(key)
        found = self._weights[key]
        while sum(w.numel() * w.element_size() for w in self._weights.values()) > CACHED_WEIGHTS_BYTES:
            self._weights.popitem(last=False)
        return path, found

    @torch.no_grad()
    def _last_hidden(self) -> list[Tensor]:
        """The last block's output for each micro-batch."""
        return [self._walker.run_blocks(self._walker.start(batch)) for batch in self._batches]
