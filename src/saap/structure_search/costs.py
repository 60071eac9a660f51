"""Second-order cost of every unit: what its removal costs the loss once the others have made up for it.

One walk over the calibration samples collects, on the way back, for the module that reads a group's channels, the Gram
matrix of its inputs, where each token weighs as much as the loss feels an error of the module's output there. Tokens
differ in both by orders of magnitude (a first token may have huge outputs that the loss hardly feels), so the mean
error times the mean sensitivity would be far off. The greedy removal order on the Gram matrix gives the squared error
of each further unit; half of it is a loss change in nats, comparable over layers and roles, also where a norm stands
between the module and the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saap.models.capture import backward_to_outputs
from saap.models.least_squares import removal_order
from saap.models.linear import weight_out_in
from saap.models.loss import loss_and_gradient
from saap.models.processes import Processes
from saap.models.spill import Spill, held
from saap.models.walked import passed, started
from saap.models.walker import BlockWalker, Contexts, inference_only
from saap.records import CoupledGroup, IntArray, ModelGraph, Role, UnitScores

CURVE_STEPS = 32
"""Batches in which the units of a module leave: fine enough for the steps of a plan."""

_Leaving = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class SecondOrder:
    """What the walk found, by group.

    grams: of the inputs of the group's consumer, (channels, channels), each token weighted by how much the loss feels
    it. scores: cost of each unit in nats per token, given that all cheaper ones of its module are gone. orders: units
    in the order of leaving.
    """

    grams: Mapping[str, Tensor]
    scores: Mapping[str, UnitScores]
    orders: Mapping[str, IntArray]


def measurable(graph: ModelGraph) -> list[CoupledGroup]:
    """Groups inside blocks whose channels are read by exactly one module: those that second-order costs exist for."""
    return [
        group
        for group in graph.groups
        if group.layer >= 0
        and group.role is not Role.QUERY
        and len(group.consumers) == 1
        and group.consumers[0].part is None
    ]


def gram_bytes(graph: ModelGraph) -> int:
    """Memory of the Gram matrices of all measurable groups."""
    sizes = [graph.shapes[group.consumers[0].tensor][group.consumers[0].axis] for group in measurable(graph)]
    return sum(4 * size * size for size in sizes)


@torch.no_grad()
def second_order_costs(
    model: nn.Module,
    graph: ModelGraph,
    tokens: Tensor,
    *,
    micro_batch: int = 4,
    ignored: Collection[int] = (),
    spill: Spill | None = None,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes | None = None,
) -> SecondOrder:
    """Collect felt Gram matrices on `tokens` (sequences, length), then order the units of every module.

    ignored: ids of which no loss is taken. spill: where the inputs of the blocks are kept if all sequences are to walk
    one block at a time, in this process alone; the Gram matrices are then not kept. processes: that take a part of the
    sequences and then of the modules each; all get the whole result. progress: of this one's part. The model is left as
    it was. Raises NonFiniteLossError.
    """
    processes = processes or Processes()
    by_path = {group.consumers[0].tensor.rpartition(".")[0]: group for group in measurable(graph)}
    walker = BlockWalker(model, graph.blocks)
    with inference_only(model):
        if spill is not None:
            found = _walk_together(walker, torch.split(tokens, micro_batch), by_path, ignored, spill, progress)
        else:
            found = _walk_alone(walker, tokens, micro_batch, by_path, ignored, processes, progress)
    scores, orders = {}, {}
    for group in by_path.values():
        order, costs = found.leaving[group.name]
        nats = torch.empty_like(costs)
        nats[order] = 0.5 * costs
        scores[group.name] = UnitScores(mean=nats.cpu().numpy(), variance=torch.zeros_like(nats).cpu().numpy())
        orders[group.name] = order.cpu().numpy()
    return SecondOrder(found.grams, scores, orders)


@dataclass(frozen=True, slots=True)
class _Walked:
    """leaving: by group. grams: by group, where they were kept."""

    leaving: Mapping[str, _Leaving]
    grams: Mapping[str, Tensor]


def _walk_alone(
    walker: BlockWalker,
    tokens: Tensor,
    micro_batch: int,
    by_path: Mapping[str, CoupledGroup],
    ignored: Collection[int],
    processes: Processes,
    progress: Callable[[int, int], None] | None,
) -> _Walked:
    """Each micro-batch through all blocks by itself."""
    weights = {path: weight_out_in(walker.model.get_submodule(path)) for path in by_path}
    grams = {by_path[path].name: _zero_gram(weight) for path, weight in weights.items()}
    sequences, modules = processes.share(len(tokens)), processes.share(len(by_path))
    batches = [tokens[start : min(start + micro_batch, sequences.stop)] for start in sequences[::micro_batch]]
    steps = len(batches) + len(modules)
    for index, batch in enumerate(batches):
        _walk(walker, batch, by_path, grams, ignored)
        if progress is not None:
            progress(index + 1, steps)
    grams = {name: processes.total(gram) for name, gram in grams.items()}
    leaving: dict[str, _Leaving] = {}
    for index, path in enumerate(list(by_path)[modules.start : modules.stop]):
        group = by_path[path]
        leaving[group.name] = _leaving(weights[path], group, grams[group.name] / tokens.numel())
        if progress is not None:
            progress(len(batches) + index + 1, steps)
    every = {name: found for part in processes.gathered(leaving) for name, found in part.items()}
    return _Walked(every, grams)


def _zero_gram(weight: Tensor) -> Tensor:
    return torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)


def _leaving(weight: Tensor, group: CoupledGroup, gram: Tensor) -> _Leaving:
    """The units of a group in the order of leaving, and the felt squared error of each. gram: mean over tokens."""
    units = torch.tensor([list(group.consumers[0].rows(unit)) for unit in range(group.units)], device=weight.device)
    at_once = max(1, group.units // CURVE_STEPS)
    return removal_order(weight, gram, units, group.units, at_once=at_once)


def _walk_together(
    walker: BlockWalker,
    batches: Sequence[Tensor],
    by_path: Mapping[str, CoupledGroup],
    ignored: Collection[int],
    spill: Spill,
    progress: Callable[[int, int], None] | None,
) -> _Walked:
    """All micro-batches through one block before the next; the units of a block are put in order while it is there."""
    blocks, tokens = len(walker.paths), sum(batch.numel() for batch in batches)
    leaving: dict[str, _Leaving] = {}
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
        grams: dict[str, Tensor] = {}
        before, entered = spill.empty(), inputs.pop()
        for entry, context, gradient in zip(entered, contexts, gradients, strict=True):
            before.append(_backward(walker, layer, entry, context, gradient, by_path, grams))
        gradients = before
        for path in _paths_in(by_path, layer):
            group = by_path[path]
            weight = weight_out_in(walker.model.get_submodule(path))
            leaving[group.name] = _leaving(weight, group, grams.pop(group.name) / tokens)
        if progress is not None:
            progress(2 * blocks - layer, 2 * blocks)
    return _Walked(leaving, {})


def _walk(
    walker: BlockWalker,
    batch: Tensor,
    by_path: Mapping[str, CoupledGroup],
    grams: dict[str, Tensor],
    ignored: Collection[int],
) -> None:
    """Add one micro-batch to the Gram matrices."""
    stream = walker.start(batch)
    inputs, hidden = [], stream.hidden
    for layer in range(len(walker.paths)):
        inputs.append(hidden)
        hidden = walker.run_block(layer, hidden, stream.contexts)
    _, gradient = loss_and_gradient(walker, hidden, batch, ignored=ignored)
    for layer in reversed(range(len(walker.paths))):
        gradient = _backward(walker, layer, inputs.pop(), stream.contexts, gradient, by_path, grams)


def _backward(
    walker: BlockWalker,
    layer: int,
    entry: Tensor,
    contexts: Contexts,
    gradient: Tensor,
    by_path: Mapping[str, CoupledGroup],
    grams: dict[str, Tensor],
) -> Tensor:
    """Gradient at the input of a block; adds what its consumers read to their Gram matrices.

    A token weighs as much as the mean squared entry, at the module's output, of its own summed-loss gradient.
    gradient: at the block's output, of the mean loss of each sequence.
    """
    before, found = backward_to_outputs(walker, layer, _paths_in(by_path, layer), entry, contexts, gradient)
    for path, taken in found.items():
        x = taken.input.flatten(0, -2).float()
        entries = taken.gradient.flatten(0, -2).float() * (entry.shape[1] - 1)
        x = x * entries.square().mean(-1, keepdim=True).sqrt()
        gram = grams.setdefault(by_path[path].name, x.new_zeros(x.shape[1], x.shape[1]))
        gram.addmm_(x.T, x)
    return before


def _paths_in(by_path: Mapping[str, CoupledGroup], layer: int) -> list[str]:
    return [path for path, group in by_path.items() if group.layer == layer]
