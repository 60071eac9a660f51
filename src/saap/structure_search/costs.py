"""Second-order cost of every unit: what its removal costs the loss once the others have made up for it.

One walk over the calibration samples collects, on the way back, for the module that reads a group's channels, the Gram
matrix of its inputs, where each token weighs as much as the loss feels an error of the module's output there. Tokens
differ in both by orders of magnitude (a first token may have huge outputs that the loss hardly feels), so the mean
error times the mean sensitivity would be far off. The greedy removal order on the Gram matrix gives the squared error
of each further unit; half of it is a loss change in nats, comparable over layers and roles, also where a norm stands
between the module and the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saap.core.records import CoupledGroup, IntArray, ModelGraph, UnitScores
from saap.models.structure.least_squares import removal_order
from saap.models.structure.linear import weight_out_in
from saap.models.walk.processes import Processes
from saap.models.walk.spill import Spill
from saap.models.walk.token_fisher import Visit, channels_of_units, in_blocks, measurable, readers, walk_felt
from saap.models.walk.walker import BlockWalker, inference_only

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
    by_path = readers(graph)
    walker = BlockWalker(model, graph.blocks)
    with inference_only(model):
        if spill is not None:
            found = _walk_together(walker, tokens, micro_batch, by_path, ignored, spill, progress)
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
    batches = -(-len(sequences) // micro_batch)
    steps = batches + len(modules)

    def walked(done: int, _total: int) -> None:
        if progress is not None:
            progress(done, steps)

    walk_felt(
        walker, tokens[sequences.start : sequences.stop], in_blocks(by_path, len(walker.paths)),
        _adding(by_path, grams), micro_batch=micro_batch, ignored=ignored, progress=walked,
    )  # fmt: skip
    grams = {name: processes.total(gram) for name, gram in grams.items()}
    leaving: dict[str, _Leaving] = {}
    for index, path in enumerate(list(by_path)[modules.start : modules.stop]):
        group = by_path[path]
        leaving[group.name] = _leaving(weights[path], group, grams[group.name] / tokens.numel())
        if progress is not None:
            progress(batches + index + 1, steps)
    every = {name: found for part in processes.gather(leaving) for name, found in part.items()}
    return _Walked(every, grams)


def _zero_gram(weight: Tensor) -> Tensor:
    return torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)


def _leaving(weight: Tensor, group: CoupledGroup, gram: Tensor) -> _Leaving:
    """The units of a group in the order of leaving, and the felt squared error of each. gram: mean over tokens."""
    units = channels_of_units(group).to(weight.device)
    at_once = max(1, group.units // CURVE_STEPS)
    return removal_order(weight, gram, units, group.units, at_once=at_once)


def _walk_together(
    walker: BlockWalker,
    tokens: Tensor,
    micro_batch: int,
    by_path: Mapping[str, CoupledGroup],
    ignored: Collection[int],
    spill: Spill,
    progress: Callable[[int, int], None] | None,
) -> _Walked:
    """All micro-batches through one block before the next; the units of a block are put in order while it is there."""
    leaving: dict[str, _Leaving] = {}
    grams: dict[str, Tensor] = {}
    by_layer = in_blocks(by_path, len(walker.paths))

    def order_units(layer: int) -> None:
        for path in by_layer[layer]:
            group = by_path[path]
            weight = weight_out_in(walker.model.get_submodule(path))
            leaving[group.name] = _leaving(weight, group, grams.pop(group.name) / tokens.numel())

    walk_felt(
        walker, tokens, by_layer, _adding(by_path, grams),
        micro_batch=micro_batch, ignored=ignored, spill=spill, left=order_units, progress=progress,
    )  # fmt: skip
    return _Walked(leaving, {})


def _adding(by_path: Mapping[str, CoupledGroup], grams: dict[str, Tensor]) -> Visit:
    """Adds what a module reads to its group's Gram matrix.

    A token weighs as much as the mean squared entry, at the module's output, of its own summed-loss gradient.
    """

    def add(path: str, x: Tensor, gradient: Tensor) -> None:
        x = x * gradient.square().mean(-1, keepdim=True).sqrt()
        gram = grams.setdefault(by_path[path].name, x.new_zeros(x.shape[1], x.shape[1]))
        gram.addmm_(x.T, x)

    return add
