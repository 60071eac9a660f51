"""One walk over the blocks for all observers, forward or forward and backward, with any offloading.

A forward pass keeps only the inputs of the blocks; the backward pass runs each block again under autograd. So memory
has the weights, the block inputs of one micro-batch, one block's activations, and one weight gradient. Gradients are
never stored in the weights. With spilled activations, all micro-batches pass one block before the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from saap.models.walk.backend import Backend, Progress, silent
from saap.models.walk.finished import read_finished, write_finished
from saap.models.walk.loss import sample_losses
from saap.models.walk.observer import Batch, Capture, Observation, Observer, Signal, capture, observing_gradients
from saap.models.walk.spill import FileTensors, Keep, Tensors
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
    digest: str = "",
) -> None:
    """Run all micro-batches of `tokens` (samples, length) with observers; each process runs its part.

    backward: also run the backward pass of each sample's own loss, the mean over its predicted tokens. ignored: labels
    without a loss. digest: of all that decides the result; with it and a spill that resumes, a single process records
    each finished block, and an interrupted walk resumes after the last one. Progress is in samples, with a spill in the
    blocks that are left. The model is not changed. Raises NonFiniteLossError, UnsupportedModelError, StaleInputError.
    """
    own = backend.processes.share(len(tokens))
    batches = [Batch(tokens[first : min(first + micro_batch, own.stop)], first) for first in own[::micro_batch]]
    one = _Walk(backend, observers, backward, ignored)
    with inference_only(backend.model):
        if backend.spill is not None:
            one.run(batches, backend.keep, backend.keep, backend.progress, _record(backend, digest, observers))
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


class _Record:
    """Record of the finished blocks of a walk in a folder."""

    def __init__(self, folder: Path, digest: str, observers: Sequence[Observer], resumed: Callable[[], None]) -> None:
        self.folder, self.digest, self.observers, self.resumed = folder, digest, observers, resumed

    def read(self, start: list[Tensors]) -> tuple[int, list[Tensors]]:
        """Number of finished passes and the streams after them, with the observers' state; `start` without a record."""
        found = read_finished(self.folder, self.digest)
        if found is None:
            return 0, start
        self.resumed()
        for number, observer in enumerate(self.observers):
            own = {name: one for name, one in found.state.items() if name.startswith(f"{number}/")}
            observer.restore({name.partition("/")[2]: one for name, one in own.items()})
        return found.steps, [FileTensors(self.folder, one) for one in found.streams]

    def write(self, steps: int, streams: Sequence[Tensors]) -> None:
        """Record the streams and the observers' state."""
        every = enumerate(observer.state() or {} for observer in self.observers)
        state = {f"{number}/{name}": one for number, found in every for name, one in found.items()}
        write_finished(self.folder, self.digest, steps, streams, state)


def _record(backend: Backend, digest: str, observers: Sequence[Observer]) -> _Record | None:
    """The record of a walk; None if it is not to be resumed, or cannot be."""
    spill = backend.spill
    if spill is None or spill.folder is None or spill.resumed is None or not digest:
        return None
    possible = backend.processes.count == 1 and all(observer.state() is not None for observer in observers)
    return _Record(spill.folder, digest, observers, spill.resumed) if possible else None


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

    def run(
        self, batches: Sequence[Batch], keep_inputs: Keep, keep: Keep, progress: Progress,
        record: _Record | None = None,
    ) -> None:  # fmt: skip
        """Run micro-batches through all blocks, block by block, and back. record: of finished blocks, if it is kept."""
        count = len(self.walker.blocks)
        lowest = min((layer for layer in range(count) if self.needs[layer]), default=count)
        steps = 2 * count - lowest if self.backward else count
        hidden, contexts = embed(self.walker, [batch.tokens for batch in batches], keep_inputs)
        done, streams = (0, [hidden]) if record is None else record.read([hidden])
        del hidden
        for step in range(done, steps):
            layer = step if step < count else 2 * count - 1 - step
            if step >= count:
                gradients = streams.pop()
                back = zip(batches, streams.pop(), contexts, gradients, strict=True)
                streams.append(keep(self._back(layer, *each) for each in back))
                for observer in self.observers if self.layered else ():
                    observer.close_block(layer)
            elif self.backward:
                streams.append(run_block(self.walker, layer, streams[-1], contexts, keep_inputs))
                if layer + 1 == count:
                    streams.append(keep(map(self._gradient, batches, streams.pop())))
            else:
                every = zip(batches, streams.pop(), contexts, strict=True)
                streams.append(keep(self._forward(layer, *each) for each in every))
            if record is not None:
                record.write(step + 1, streams)
            progress(step + 1 - done, steps - done)

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
