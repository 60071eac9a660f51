"""The pass over the calibration samples that scores every unit.

A micro-batch walks all blocks forward, of which only the blocks' inputs are kept, then from the last block back to the
first, each run again under autograd. So besides the weights there are in memory: the block inputs of one micro-batch,
one block's activations, one weight gradient. No weight ever holds a gradient.

Where the weights are read as they are used, all micro-batches walk through one block before the next, so that each
block is read once forward and once backward; the blocks' inputs then lie on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from saap.core.errors import CalibrationError, NonFiniteLossError
from saap.core.records import CalibrationSet, FloatArray, ImportanceScores, ModelGraph, Role
from saap.estimation.importance import aggregate, vector_importance
from saap.estimation.observers import Batch, GroupParts, PartScores, Scratch, Taps, make_taps, watching
from saap.estimation.stacked import stacked_scores, whole_scores
from saap.estimation.statistics import Moments, merge
from saap.models.walk.layerwise import passed, started
from saap.models.walk.loss import loss_and_gradient
from saap.models.walk.processes import Processes
from saap.models.walk.spill import Spill
from saap.models.walk.walker import BlockWalker, Contexts, inference_only
from saap.settings.prune import Aggregation, ElementOrder

TOKENS_AT_ONCE = 256
"""Tokens of a micro-batch. More are no faster on a CPU, and each costs the inputs of all blocks in memory."""

_Parts = Mapping[str, Mapping[int, PartScores]]


def estimate(
    model: nn.Module,
    graph: ModelGraph,
    calibration: CalibrationSet,
    *,
    roles: Collection[Role] = (Role.FFN, Role.ATTENTION),
    element_order: ElementOrder = ElementOrder.SECOND,
    aggregation: Aggregation = Aggregation.SUM,
    micro_batch: int | None = None,
    spill: Spill | None = None,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes | None = None,
) -> ImportanceScores:
    """Vector-wise and element-wise importance of every unit of the groups of `roles`: mean and spread over samples.

    One pass gives both. The importance of each sample is that of its own loss, the mean over its predicted tokens;
    samples are then averaged. Members in linear modules of the decoder blocks are scored, biases with their channels.
    micro_batch: samples at a time, by default as many as fit into 256 tokens; it does not change the result. Where a
    group lies in stacked tensors (experts) it is one sample.
    spill: where the inputs of the blocks are kept if all samples are to walk one block at a time, which does not change
    the result. progress: called with the numbers of samples (with `spill`, of block passes) done and of all. The model
    is left as it was.
    processes: that score a part of the samples each and all get the whole result; progress is that of this one's part.
    Raises CalibrationError for less than two samples, NonFiniteLossError, UnsupportedModelError.
    """
    samples, length = calibration.tokens.shape
    if samples < 2:
        raise CalibrationError("Fluctuation over samples needs two of them", "Use --num-samples 2 or more")
    rows = micro_batch or max(1, TOKENS_AT_ONCE // length)
    tokens = torch.from_numpy(calibration.tokens).to(next(model.parameters()).device)
    taps = make_taps(model, graph, [group for group in graph.groups if group.role in roles])
    if taps.stacked or taps.whole:
        rows = 1  # the gradient of a weight is a sum over samples
    walker, scratch = BlockWalker(model, graph.blocks), Scratch()
    processes = processes or Processes()
    own = processes.share(samples)
    moments: dict[str, Moments] = {}
    losses: list[FloatArray] = []
    walk = _Walk(walker, taps, element_order, scratch, calibration.ignored)
    with inference_only(model):
        if spill is not None:
            batches = torch.split(tokens[own.start : own.stop], rows)
            for scored in walk.together(batches, own.start, spill, progress):
                _take(scored, taps, aggregation, moments, losses)
        else:
            inputs = _Inputs()
            for first in own[::rows]:
                last = min(first + rows, own.stop)
                _take(walk.alone(tokens[first:last], first, inputs), taps, aggregation, moments, losses)
                if progress is not None:
                    progress(last - own.start, len(own))
    found = processes.gathered((moments, losses))
    return ImportanceScores(
        graph_digest=graph.digest,
        calibration_digest=calibration.digest,
        samples=samples,
        element_order=str(element_order),
        aggregation=str(aggregation),
        losses=np.concatenate([part for _, parts in found for part in parts]),
        groups={name: _merged([part for part, _ in found], name).scores() for name in taps.groups},
    )


def _merged(parts: Sequence[Mapping[str, Moments]], name: str) -> Moments:
    """Moments of one group over the samples of all parts; a part without samples has none."""
    return reduce(merge, [part[name] for part in parts if part])


class _Inputs:
    """The inputs of all blocks for one micro-batch, in one piece that all micro-batches use.

    Tensors of their own, made between the temporary ones of the blocks, would leave the heap in fragments.
    """

    def __init__(self) -> None:
        self._store: Tensor | None = None

    def of(self, blocks: int, hidden: Tensor) -> Tensor:
        """Room for `blocks` tensors of the shape of `hidden`, at most as large as at the first call."""
        if self._store is None:
            self._store = hidden.new_empty(blocks, *hidden.shape)
        return self._store[:, : len(hidden)]


@dataclass(frozen=True, slots=True)
class _Scored:
    """Scores of some samples, the first of which is number `first`. losses: (samples,); None where only parts are new.

    parts: by group and position, of groups that are complete.
    """

    first: int
    samples: int
    losses: Tensor | None
    parts: _Parts


@dataclass(frozen=True, slots=True)
class _Walk:
    """Forward and backward through all blocks."""

    walker: BlockWalker
    taps: Taps
    order: ElementOrder
    scratch: Scratch
    ignored: tuple[int, ...]

    @property
    def lowest(self) -> int:
        """The first block with parts to score; no gradient is needed below it."""
        return min((*self.taps.by_block, *self.taps.stacked, *self.taps.whole), default=len(self.walker.blocks))

    def alone(self, tokens: Tensor, first: int, store: _Inputs) -> _Scored:
        """One micro-batch through all blocks."""
        stream = self.walker.start(tokens)
        inputs = store.of(len(self.walker.blocks), stream.hidden)
        hidden = stream.hidden
        with torch.no_grad():
            for index in range(len(self.walker.blocks)):
                inputs[index].copy_(hidden)
                hidden = self.walker.run_block(index, hidden, stream.contexts)
        losses, gradient = self._loss(hidden, tokens, first)
        parts: dict[str, dict[int, PartScores]] = {name: {} for name in self.taps.groups}
        for index in reversed(range(self.lowest, len(self.walker.blocks))):
            gradient = self._backward(index, inputs[index], stream.contexts, gradient, tokens, parts)
        return _Scored(first, len(tokens), losses, parts)

    def together(
        self, batches: Sequence[Tensor], start: int, spill: Spill, progress: Callable[[int, int], None] | None
    ) -> Iterator[_Scored]:
        """All micro-batches through one block before the next. A group's scores come when its blocks are done.

        start: number of the first sample.
        """
        blocks = len(self.walker.blocks)
        *firsts, _ = accumulate((len(batch) for batch in batches), initial=start)
        steps = 2 * blocks - self.lowest

        def done(step: int) -> None:
            if progress is not None:
                progress(step, steps)

        entered, contexts = started(self.walker, batches, spill.empty)
        inputs = [entered]
        with torch.no_grad():
            for index in range(blocks):
                inputs.append(passed(self.walker, index, inputs[-1], contexts, spill.empty))
                done(index + 1)
        gradients = spill.empty()
        for first, batch, hidden in zip(firsts, batches, inputs.pop(), strict=True):
            losses, gradient = self._loss(hidden, batch, first)
            gradients.append(gradient)
            yield _Scored(first, len(batch), losses, {})
        complete = self.taps.complete_at()
        waiting: list[dict[str, dict[int, PartScores]]] = [{} for _ in batches]
        for index in reversed(range(self.lowest, blocks)):
            before, entered = spill.empty(), inputs.pop()
            for place, (first, batch) in enumerate(zip(firsts, batches, strict=True)):
                parts = waiting[place]
                before.append(self._backward(index, entered[place], contexts[place], gradients[place], batch, parts))
                yield _Scored(first, len(batch), None, {name: parts.pop(name, {}) for name in complete.get(index, ())})
            gradients = before
            done(2 * blocks - index)

    def _loss(self, hidden: Tensor, tokens: Tensor, first: int) -> tuple[Tensor, Tensor]:
        return loss_and_gradient(self.walker, hidden, tokens, first_sample=first, ignored=self.ignored)

    def _backward(
        self, index: int, entry: Tensor, contexts: Contexts, gradient: Tensor, tokens: Tensor,
        parts: dict[str, dict[int, PartScores]],
    ) -> Tensor:  # fmt: skip
        """One micro-batch back through one block: adds to `parts`, returns the gradient at the block's input."""
        walker, taps = self.walker, self.taps
        batch = Batch(samples=tokens.shape[0], length=tokens.shape[1], order=self.order)
        with watching(walker.model, taps.by_block.get(index, {}), batch, self.scratch) as watched:
            weights = {name: walker.model.get_parameter(name) for name in taps.by_gradient(index)}
            before, found = walker.backward_to_weights(index, entry, contexts, gradient, weights)
        for name, of_weight in found.items():
            weight, stack = weights[name].detach(), taps.stacked.get(index, {}).get(name, {})
            scored = stacked_scores(weight, of_weight, stack, batch.length - 1, self.order)
            if name in taps.whole.get(index, {}):
                scored[taps.whole[index][name]] = whole_scores(weight, of_weight, batch.length - 1, self.order)
            for (group, position), scores in scored.items():
                parts.setdefault(group, {})[position] = scores
        for tap in watched:
            for (group, position), scores in tap.scores.items():
                parts.setdefault(group, {})[position] = scores
        return before


def _take(
    found: _Scored, taps: Taps, aggregation: Aggregation, moments: dict[str, Moments], losses: list[FloatArray]
) -> None:
    """Add what was found of some samples to the statistics."""
    if found.losses is not None:
        losses.append(_as_numpy(found.losses))
    for name, parts in found.parts.items():
        _add(moments, name, _group_scores(parts, taps.groups[name], found.samples, aggregation), found.first)


def _group_scores(
    parts: Mapping[int, PartScores], group: GroupParts, samples: int, aggregation: Aggregation
) -> tuple[FloatArray, FloatArray]:
    """Vector-wise and element-wise importance, both (samples, units), from a group's parts.

    A part that did not run (an expert without tokens) changes nothing and scores zero.
    """
    nothing = torch.zeros(samples, group.units, dtype=torch.float64)
    changes, elements = [nothing] * group.parts, [nothing] * group.parts
    for position, scores in parts.items():
        changes[position] = scores.change.cpu().double()
        elements[position] = scores.element.cpu().double()
    vector = vector_importance(torch.stack(changes), aggregation, group.last)
    return vector.numpy(), aggregate(torch.stack(elements), aggregation, group.last).numpy()


def _add(moments: dict[str, Moments], name: str, scores: tuple[FloatArray, FloatArray], first: int) -> None:
    for offset, (vector, element) in enumerate(zip(*scores, strict=True)):
        if not (np.isfinite(vector).all() and np.isfinite(element).all()):
            raise NonFiniteLossError(
                f"The importance of {name} for calibration sample {first + offset} is not a finite number",
                "Compute in float32 (--dtype float32) and check the text of that sample",
            )
        sample = Moments.of(vector, element)
        moments[name] = merge(moments[name], sample) if name in moments else sample


def _as_numpy(tensor: Tensor) -> FloatArray:
    array: FloatArray = tensor.cpu().double().numpy()
    return array
