"""What modules read and what the loss feels at their outputs, token by token, over a whole text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from saap.core.records import CoupledGroup, ModelGraph, Role
from saap.models.walk.capture import backward_to_outputs
from saap.models.walk.layerwise import inputs_of_blocks, passed, started
from saap.models.walk.loss import loss_and_gradient
from saap.models.walk.spill import Spill, held
from saap.models.walk.walker import BlockWalker, Contexts

Visit = Callable[[str, Tensor, Tensor], None]
"""Called with a module's path, its input (tokens, channels) and the gradient at its output (tokens, outputs), float32;
the gradient is that of the sequence's summed loss."""


def measurable(graph: ModelGraph) -> list[CoupledGroup]:
    """Groups inside blocks whose channels are read by exactly one module."""
    return [
        group
        for group in graph.groups
        if group.layer >= 0
        and group.role is not Role.QUERY
        and len(group.consumers) == 1
        and group.consumers[0].part is None
    ]


def readers(graph: ModelGraph) -> dict[str, CoupledGroup]:
    """The measurable groups by the path of the module that reads them."""
    return {group.consumers[0].tensor.rpartition(".")[0]: group for group in measurable(graph)}


def in_blocks(by_path: Mapping[str, CoupledGroup], blocks: int) -> list[list[str]]:
    """The paths of each block's readers."""
    return [[path for path, group in by_path.items() if group.layer == layer] for layer in range(blocks)]


def channels_of_units(group: CoupledGroup) -> Tensor:
    """Channels of each unit of a measurable group in the module that reads them: (units, width)."""
    return torch.tensor([list(group.consumers[0].rows(unit)) for unit in range(group.units)])


@torch.no_grad()
def walk_felt(
    walker: BlockWalker,
    tokens: Tensor,
    by_layer: Sequence[Sequence[str]],
    visit: Visit,
    *,
    micro_batch: int,
    ignored: Collection[int] = (),
    spill: Spill | None = None,
    left: Callable[[int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Show `visit` every module at `by_layer`'s paths, for each micro-batch of `tokens` (sequences, length).

    ignored: ids of which no loss is taken. spill: keeps the inputs of the blocks if all batches are to walk one block
    at a time; without it each walks through all blocks by itself. left: called with each block, backwards, once all
    batches have left it; with a spill only.
    """
    batches = torch.split(tokens, micro_batch) if len(tokens) else ()
    if spill is not None:
        _together(walker, batches, by_layer, visit, ignored, spill, left, progress)
        return
    for index, batch in enumerate(batches):
        stream = walker.start(batch)
        inputs, hidden = inputs_of_blocks(walker, stream)
        _, gradient = loss_and_gradient(walker, hidden, batch, ignored=ignored)
        for layer in reversed(range(len(walker.paths))):
            gradient = _back(walker, layer, inputs.pop(), stream.contexts, gradient, by_layer[layer], visit)
        if progress is not None:
            progress(index + 1, len(batches))


def _together(
    walker: BlockWalker,
    batches: Sequence[Tensor],
    by_layer: Sequence[Sequence[str]],
    visit: Visit,
    ignored: Collection[int],
    spill: Spill,
    left: Callable[[int], None] | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """All batches through one block before the next."""
    blocks = len(walker.paths)
    hidden, contexts = started(walker, batches, spill.empty)
    inputs = []
    for layer in range(blocks):
        inputs.append(hidden)
        hidden = passed(walker, layer, hidden, contexts, spill.empty)
        if progress is not None:
            progress(layer + 1, 2 * blocks)
    ends = zip(hidden, batches, strict=True)
    gradients = held(spill.empty, (loss_and_gradient(walker, last, batch, ignored=ignored)[1] for last, batch in ends))
    for layer in reversed(range(blocks)):
        before, entered = spill.empty(), inputs.pop()
        for entry, context, gradient in zip(entered, contexts, gradients, strict=True):
            before.append(_back(walker, layer, entry, context, gradient, by_layer[layer], visit))
        gradients = before
        if left is not None:
            left(layer)
        if progress is not None:
            progress(2 * blocks - layer, 2 * blocks)


def _back(
    walker: BlockWalker,
    layer: int,
    entry: Tensor,
    contexts: Contexts,
    gradient: Tensor,
    paths: Sequence[str],
    visit: Visit,
) -> Tensor:
    """Gradient at the input of a block. gradient: at its output, of the mean loss of each sequence."""
    before, found = backward_to_outputs(walker, layer, paths, entry, contexts, gradient)
    for path, taken in found.items():
        entries = taken.gradient.flatten(0, -2).float() * (entry.shape[1] - 1)
        visit(path, taken.input.flatten(0, -2).float(), entries)
    return before
