"""One walk over the blocks for all observers, forward or forward and backward, with any offloading.

A forward pass keeps only the inputs of the blocks; the backward pass runs each block again under autograd. So memory
has the weights, the block inputs of one micro-batch, one block's activations, and one weight gradient. Gradients are
never stored in the weights. With spilled activations, all micro-batches pass one block before the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import cycle

import torch
from torch import Tensor

from saap.models.walk.backend import Backend, Progress, silent
from saap.models.walk.loss import sample_losses
from saap.models.walk.observer import Batch, Capture, Observation, Observer, Signal, capture, observing_gradients
from saap.models.walk.spill import Keep, Tensors
from saap.models.walk.walker import BlockWalker, Contexts, inference_only


@torch.no_grad()
def walk(
    backend: Backend,
    tokens: Tensor,
    observers: Sequence[Observer],
    *,
    micro_batch: int,
    backward: bool = True,
    ignored: Collection[int] = (),
) -> None:
    """Run all micro-batches of `tokens` (samples, length) with observers; each process runs its part.

    backward: also run the backward pass of each sample's own loss, the mean over its predicted tokens. ignored: labels
    without a loss. Progress is in samples, with a spill in blocks. The model is not changed. Raises NonFiniteLossError,
    UnsupportedModelError.
    """
    own = backend.processes.share(len(tokens))
    batches = [Batch(tokens[first : min(first + micro_batch, own.stop)], first) for first in own[::micro_batch]]
    one = _Walk(backend, observers, backward, ignored)
    with inference_only(backend.model):
        if backend.spill is not None:
            one.run(batches, backend.keep, backend.keep, backend.progress)
        else:
            keep_inputs = _slots(len(one.walker.blocks) + 1) if backward else deque
            for batch in batches:
                one.run([batch], keep_inputs, deque, silent)
                backend.progress(batch.first + len(batch.tokens) - own.start, len(own))
    for observer in observers:
        observer.merge(backend.processes)


def _slots(count: int) -> Keep:
    """Ring buffer for copies, each valid until `count` others were made; none may be larger than the first.

    Separate tensors, allocated between temporary ones of the blocks, would fragment the heap.
    """
    room: list[Tensor] = []
    places = cycle(range(count))

    def copy(tensor: Tensor) -> Tensor:
        if not room:
            room.append(tensor.new_empty(count, *tensor.shape))
        return room[0][next(places), : len(tensor)].copy_(tensor)

    return lambda tensors: deque(map(copy, tensors))


class _Walk:
    """A walk over the blocks of one model. needs: signals that the observers need from each block."""

    def __init__(
        self, backend: Backend, observers: Sequence[Observer], backward: bool, ignored: Collection[int]
    ) -> None:
        self.walker, self.observers, self.backward, self.ignored = backend.walker(), observers, backward, ignored
        self.layered = backend.spill is not None
        self.needs: list[dict[str, Signal]] = [{} for _ in self.walker.blocks]
        for observer in observers:
            for site, signals in observer.needs.items():
                layer = backend.graph.block_of(f"{site}.")
                if layer >= 0:
                    self.needs[layer][site] = self.needs[layer].get(site, Signal(0)) | signals

    def run(self, batches: Sequence[Batch], keep_inputs: Keep, keep: Keep, progress: Progress) -> None:
        """Run micro-batches through all blocks, block by block, and back."""
        blocks = range(len(self.walker.blocks))
        lowest = min((layer for layer in blocks if self.needs[layer]), default=len(blocks))
        steps = 2 * len(blocks) - lowest if self.backward else len(blocks)
        hidden, contexts = embed(self.walker, [batch.tokens for batch in batches], keep_inputs)
        inputs = []
        for layer in blocks:
            if self.backward:
                inputs.append(hidden)
                hidden = run_block(self.walker, layer, hidden, contexts, keep_inputs)
            else:
                every = zip(batches, hidden, contexts, strict=True)
                hidden = keep(self._forward(layer, *each) for each in every)
            progress(layer + 1, steps)
        if not self.backward:
            return
        gradients = keep(map(self._gradient, batches, hidden))
        del hidden
        for layer in reversed(range(lowest, len(blocks))):
            back = zip(batches, inputs.pop(), contexts, gradients, strict=True)
            gradients = keep(self._back(layer, *each) for each in back)
            for observer in self.observers if self.layered else ():
                observer.close_block(layer)
            progress(steps + lowest - layer, steps)

    def _show(self, seen: Observation) -> None:
        for observer in self.observers:
            if seen.site in observer.needs:
                observer.observe(seen)

    def _forward(self, layer: int, batch: Batch, hidden: Tensor, contexts: Contexts) -> Tensor:
        block, needs = self.walker.paths[layer], self.needs[layer]
        with capture(self.walker.model, [site for site in needs if site != block]) as found:
            after = self.walker.run_block(layer, hidden, contexts)
        if block in needs:
            found[block] = Capture(hidden, after, (hidden,))
        for site, (x, y, arguments) in found.items():
            self._show(Observation(site=site, batch=batch, x=x, y=y, arguments=arguments))
        return after

    def _gradient(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Gradient of each sample's loss at the last block's output."""
        losses, gradient = sample_losses(
            self.walker, hidden, batch.tokens, first_sample=batch.first, ignored=self.ignored
        )
        for observer in self.observers:
            observer.observe_loss(batch, losses)
        return gradient

    def _back(self, layer: int, batch: Batch, entry: Tensor, contexts: Contexts, gradient: Tensor) -> Tensor:
        """Gradient at the input of a block, given that at its output."""
        needs = self.needs[layer]
        modules = {site: signals for site, signals in needs.items() if Signal.WEIGHT_GRADIENT not in signals}
        weights = {site: self.walker.model.get_parameter(site) for site in needs if site not in modules}
        with observing_gradients(self.walker.model, modules, batch, self._show):
            before, found = self.walker.backward_to_weights(layer, entry, contexts, gradient, weights)
        for name, gradient_of_weight in found.items():
            self._show(Observation(site=name, batch=batch, dw=gradient_of_weight))
        for observer in self.observers:
            observer.leave_block(layer, batch)
        return before


def embed(walker: BlockWalker, batches: Iterable[Tensor], keep: Keep) -> tuple[Tensors, list[Contexts]]:
    """Embed each batch of ids (sequences, tokens): inputs of the first block, and the contexts of the batches."""
    contexts: list[Contexts] = []

    def start(batch: Tensor) -> Tensor:
        stream = walker.start(batch)
        contexts.append(stream.contexts)
        return stream.hidden

    return keep(map(start, batches)), contexts


def run_block(walker: BlockWalker, layer: int, hidden: Tensors, contexts: Sequence[Contexts], keep: Keep) -> Tensors:
    """Output of a block for the hidden states of each batch."""
    return keep(walker.run_block(layer, *each) for each in zip(hidden, contexts, strict=True))


@torch.no_grad()
def layerwise_logits(walker: BlockWalker, batches: Sequence[Tensor], *, keep: Keep) -> Iterator[Tensor]:
    """Logits (sequences, tokens, vocabulary) of each batch of ids, in order; all batches pass one block at a time."""
    hidden, contexts = embed(walker, batches, keep)
    for layer in range(len(walker.blocks)):
        hidden = run_block(walker, layer, hidden, contexts, keep)
    for last in hidden:
        with torch.no_grad():
            yield walker.logits(last)
