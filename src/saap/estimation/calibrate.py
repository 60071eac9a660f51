"""The pass over the calibration samples that scores every unit.

A micro-batch walks all blocks forward, of which only the blocks' inputs are kept, then from the last block back to the
first, each run again under autograd. So besides the weights there are in memory: the block inputs of one micro-batch,
one block's activations, one weight gradient. No weight ever holds a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from saap.config import Aggregation, ElementOrder
from saap.errors import CalibrationError, NonFiniteLossError
from saap.estimation.importance import aggregate, vector_importance
from saap.estimation.stacked import stacked_scores, whole_scores
from saap.estimation.statistics import Moments, merge
from saap.estimation.taps import Batch, GroupParts, PartScores, Scratch, Taps, make_taps, watching
from saap.models.loss import loss_and_gradient
from saap.models.walker import BlockWalker, inference_only
from saap.records import CalibrationSet, FloatArray, ImportanceScores, ModelGraph, Role

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
    progress: Callable[[int, int], None] | None = None,
) -> ImportanceScores:
    """Vector-wise and element-wise importance of every unit of the groups of `roles`: mean and spread over samples.

    One pass gives both. The importance of each sample is that of its own loss, the mean over its predicted tokens;
    samples are then averaged. Members in linear modules of the decoder blocks are scored, biases with their channels.
    micro_batch: samples at a time, by default as many as fit into 256 tokens; it does not change the result. Where a
    group lies in stacked tensors (experts) it is one sample.
    progress: called with the numbers of samples done and of all. The model is left as it was.
    Raises CalibrationError for less than two samples, NonFiniteLossError, UnsupportedModelError.
    """
    samples, length = calibration.tokens.shape
    if samples < 2:
        raise CalibrationError("Fluctuation over samples needs two of them", "Use --samples 2 or more")
    rows = micro_batch or max(1, TOKENS_AT_ONCE // length)
    tokens = torch.from_numpy(calibration.tokens).to(next(model.parameters()).device)
    taps = make_taps(model, graph, [group for group in graph.groups if group.role in roles])
    if taps.stacked or taps.whole:
        rows = 1  # the gradient of a weight is a sum over samples
    walker, inputs, scratch = BlockWalker(model, graph.blocks), _Inputs(), Scratch()
    moments: dict[str, Moments] = {}
    losses: list[FloatArray] = []
    with inference_only(model):
        for first in range(0, samples, rows):
            part_losses, parts = _score_micro_batch(
                walker, taps, tokens[first : first + rows], first, element_order, inputs, scratch, calibration.ignored
            )
            losses.append(_as_numpy(part_losses))
            for name, group in taps.groups.items():
                _add(moments, name, _group_scores(parts[name], group, len(part_losses), aggregation), first)
            if progress is not None:
                progress(min(first + rows, samples), samples)
    return ImportanceScores(
        graph_digest=graph.digest,
        calibration_digest=calibration.digest,
        samples=samples,
        element_order=str(element_order),
        aggregation=str(aggregation),
        losses=np.concatenate(losses),
        groups={name: moments[name].scores() for name in taps.groups},
    )


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


def _score_micro_batch(
    walker: BlockWalker,
    taps: Taps,
    tokens: Tensor,
    first: int,
    order: ElementOrder,
    store: _Inputs,
    scratch: Scratch,
    ignored: tuple[int, ...],
) -> tuple[Tensor, _Parts]:
    """Losses of the samples, and the scores of all parts by group and position."""
    batch = Batch(samples=tokens.shape[0], length=tokens.shape[1], order=order)
    stream = walker.start(tokens)
    inputs = store.of(len(walker.blocks), stream.hidden)
    hidden = stream.hidden
    with torch.no_grad():
        for index in range(len(walker.blocks)):
            inputs[index].copy_(hidden)
            hidden = walker.run_block(index, hidden, stream.contexts)
    losses, gradient = loss_and_gradient(walker, hidden, tokens, first_sample=first, ignored=ignored)
    parts: dict[str, dict[int, PartScores]] = {name: {} for name in taps.groups}
    lowest = min((*taps.by_block, *taps.stacked, *taps.whole), default=len(walker.blocks))
    for index in reversed(range(lowest, len(walker.blocks))):
        with watching(walker.model, taps.by_block.get(index, {}), batch, scratch) as watched:
            weights = {name: walker.model.get_parameter(name) for name in taps.by_gradient(index)}
            gradient, found = walker.backward_to_weights(index, inputs[index], stream.contexts, gradient, weights)
        for name, of_weight in found.items():
            weight, stack = weights[name].detach(), taps.stacked.get(index, {}).get(name, {})
            scored = stacked_scores(weight, of_weight, stack, batch.length - 1, order)
            if name in taps.whole.get(index, {}):
                scored[taps.whole[index][name]] = whole_scores(weight, of_weight, batch.length - 1, order)
            for (group, position), scores in scored.items():
                parts[group][position] = scores
        for tap in watched:
            for (group, position), scores in tap.scores.items():
                parts[group][position] = scores
    return losses, parts


def _group_scores(
    parts: Mapping[int, PartScores], group: GroupParts, samples: int, aggregation: Aggregation
) -> tuple[FloatArray, FloatArray]:
    """Vector-wise and element-wise importance, both (samples, units), from a group's parts.

    A part that did not run (an expert without tokens) changes nothing and scores zero.
    """
    nothing = torch.zeros(samples, group.units, dtype=torch.float64)
    changes, elements = [nothing] * group.parts, [nothing] * group.parts
    for position, scores in parts.items():
        changes[position] = scores.change.double().cpu()
        elements[position] = scores.element.double().cpu()
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
    array: FloatArray = tensor.double().cpu().numpy()
    return array
