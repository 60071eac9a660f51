"""Second-order cost of every unit: what its removal costs the loss once the others have made up for it.

One walk over the calibration samples collects, for the module that reads a group's channels, the Gram matrix of its
inputs, and, on the way back, how strongly the loss feels that module's output. The greedy removal order on the Gram
matrix gives the squared output error of each further unit; half the sensitivity times it is a loss change in nats,
comparable over layers and roles, also where a norm stands between the module and the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saap.models.capture import backward_to_outputs, capture
from saap.models.least_squares import removal_order
from saap.models.linear import weight_out_in
from saap.models.loss import loss_and_gradient
from saap.models.processes import Processes
from saap.models.spill import Spill, held
from saap.models.walked import started
from saap.models.walker import BlockWalker, Contexts, inference_only
from saap.records import CoupledGroup, IntArray, ModelGraph, Role, UnitScores

CURVE_STEPS = 32
"""Batches in which the units of a module leave: fine enough for the steps of a plan."""

_Leaving = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class SecondOrder:
    """What the walk found, by group. grams: of the inputs of the group's consumer, (channels, channels).

    scores: cost of each unit in nats per token, given that all cheaper ones of its module are gone. orders: units in
    the order of leaving.
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
    """Collect Gram matrices and sensitivities on `tokens` (sequences, length), then order the units of every module.

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
    sensitivity = dict(zip(by_path, found.sensitivity / tokens.numel(), strict=True))
    scores, orders = {}, {}
    for path, group in by_path.items():
        order, costs = found.leaving[group.name]
        nats = torch.empty_like(costs)
        nats[order] = 0.5 * sensitivity[path].to(costs) * costs
        scores[group.name] = UnitScores(mean=nats.cpu().numpy(), variance=torch.zeros_like(nats).cpu().numpy())
        orders[group.name] = order.cpu().numpy()
    return SecondOrder(found.grams, scores, orders)


@dataclass(frozen=True, slots=True)
class _Walked:
    """leaving: by group. sensitivity: sums over tokens, by module. grams: by group, where they were kept."""

    leaving: Mapping[str, _Leaving]
    sensitivity: Tensor
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
    sensitivity = torch.zeros(len(by_path), dtype=torch.float64)
    sequences, modules = processes.share(len(tokens)), processes.share(len(by_path))
    batches = [tokens[start : min(start + micro_batch, sequences.stop)] for start in sequences[::micro_batch]]
    steps = len(batches) + len(modules)
    for index, batch in enumerate(batches):
        _walk(walker, batch, by_path, grams, sensitivity, ignored)
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
    return _Walked(every, processes.total(sensitivity), grams)


def _zero_gram(weight: Tensor) -> Tensor:
    return torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)


def _leaving(weight: Tensor, group: CoupledGroup, gram: Tensor) -> _Leaving:
    """The units of a group in the order of leaving, and the squared output error of each. gram: mean over tokens."""
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
    sensitivity = torch.zeros(len(by_path), dtype=torch.float64)
    hidden, contexts = started(walker, batches, spill.empty)
    inputs = []
    for layer in range(blocks):
        inputs.append(hidden)
        grams: dict[str, Tensor] = {}
        passed = (_forward(walker, layer, *one, by_path, grams) for one in zip(hidden, contexts, strict=True))
        hidden = held(spill.empty, passed)
        for path in _paths_in(by_path, layer):
            group = by_path[path]
            weight = weight_out_in(walker.model.get_submodule(path))
            leaving[group.name] = _leaving(weight, group, grams.pop(group.name) / tokens)
        if progress is not None:
            progress(layer + 1, 2 * blocks)
    ends = zip(hidden, batches, strict=True)
    gradients = held(spill.empty, (loss_and_gradient(walker, last, batch, ignored=ignored)[1] for last, batch in ends))
    for layer in reversed(range(blocks)):
        before, entered = spill.empty(), inputs.pop()
        for entry, context, gradient in zip(entered, contexts, gradients, strict=True):
            before.append(_backward(walker, layer, entry, context, gradient, by_path, sensitivity))
        gradients = before
        if progress is not None:
            progress(2 * blocks - layer, 2 * blocks)
    return _Walked(leaving, sensitivity, {})


def _walk(
    walker: BlockWalker,
    batch: Tensor,
    by_path: Mapping[str, CoupledGroup],
    grams: dict[str, Tensor],
    sensitivity: Tensor,
    ignored: Collection[int],
) -> None:
    """Add one micro-batch to the Gram matrices and to the modules' sum over tokens of the squared gradient entry."""
    stream = walker.start(batch)
    inputs, hidden = [], stream.hidden
    for layer in range(len(walker.paths)):
        inputs.append(hidden)
        hidden = _forward(walker, layer, hidden, stream.contexts, by_path, grams)
    _, gradient = loss_and_gradient(walker, hidden, batch, ignored=ignored)
    for layer in reversed(range(len(walker.paths))):
        gradient = _backward(walker, layer, inputs.pop(), stream.contexts, gradient, by_path, sensitivity)


def _forward(
    walker: BlockWalker,
    layer: int,
    hidden: Tensor,
    contexts: Contexts,
    by_path: Mapping[str, CoupledGroup],
    grams: dict[str, Tensor],
) -> Tensor:
    """Output of a block; what its consumers read is added to their Gram matrices."""
    with capture(walker.model, _paths_in(by_path, layer)) as seen:
        output = walker.run_block(layer, hidden, contexts)
    for path, taken in seen.items():
        x = taken.input.flatten(0, -2).float()
        gram = grams.setdefault(by_path[path].name, x.new_zeros(x.shape[1], x.shape[1]))
        gram.addmm_(x.T, x)
    return output


def _backward(
    walker: BlockWalker,
    layer: int,
    entry: Tensor,
    contexts: Contexts,
    gradient: Tensor,
    by_path: Mapping[str, CoupledGroup],
    sensitivity: Tensor,
) -> Tensor:
    """Gradient at the input of a block; adds, for its modules, the mean squared entry at their output, over tokens.

    gradient: at the block's output, of the mean loss of each sequence.
    """
    before, found = backward_to_outputs(walker, layer, _paths_in(by_path, layer), entry, contexts, gradient)
    for place, path in enumerate(by_path):
        if path in found:
            # times the predictions of a sequence: of each token's own loss
            sensitivity[place] += float((found[path].double() * (entry.shape[1] - 1)).square().mean(-1).sum())
    return before


def _paths_in(by_path: Mapping[str, CoupledGroup], layer: int) -> list[str]:
    return [path for path, group in by_path.items() if group.layer == layer]
