"""Second-order cost of every unit: what its removal costs the loss once the others have made up for it.

One walk over the calibration samples collects, for the module that reads a group's channels, the Gram matrix of its
inputs, and, on the way back, how strongly the loss feels the block's output. The greedy removal order on the Gram
matrix gives the squared output error of each further unit; half the sensitivity times it is a loss change in nats,
comparable over layers and roles.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saap.models.capture import capture
from saap.models.least_squares import removal_order
from saap.models.linear import weight_out_in
from saap.models.loss import loss_and_gradient
from saap.models.walker import BlockWalker, inference_only
from saap.records import CoupledGroup, IntArray, ModelGraph, Role, UnitScores

CURVE_STEPS = 32
"""Batches in which the units of a module leave: fine enough for the steps of a plan."""


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
    progress: Callable[[int, int], None] | None = None,
) -> SecondOrder:
    """Collect Gram matrices and sensitivities on `tokens` (sequences, length), then order the units of every module.

    ignored: ids of which no loss is taken. The model is left as it was. Raises NonFiniteLossError.
    """
    groups = measurable(graph)
    by_path = {group.consumers[0].tensor.rpartition(".")[0]: group for group in groups}
    walker = BlockWalker(model, graph.blocks)
    grams: dict[str, Tensor] = {}
    sensitivity = torch.zeros(len(graph.blocks), dtype=torch.float64)
    with inference_only(model):
        batches = torch.split(tokens, micro_batch)
        for index, batch in enumerate(batches):
            _walk(walker, batch, by_path, grams, sensitivity, ignored)
            if progress is not None:
                progress(index + 1, len(batches) + len(by_path))
    sensitivity /= tokens.numel()
    scores, orders = {}, {}
    for index, (path, group) in enumerate(by_path.items()):
        weight = weight_out_in(model.get_submodule(path))
        units = torch.tensor([list(group.consumers[0].rows(unit)) for unit in range(group.units)], device=weight.device)
        at_once = max(1, group.units // CURVE_STEPS)
        order, costs = removal_order(weight, grams[group.name] / tokens.numel(), units, group.units, at_once=at_once)
        nats = torch.empty_like(costs)
        nats[order] = 0.5 * sensitivity[group.layer].to(costs) * costs
        scores[group.name] = UnitScores(mean=nats.cpu().numpy(), variance=torch.zeros_like(nats).cpu().numpy())
        orders[group.name] = order.cpu().numpy()
        if progress is not None:
            progress(len(batches) + index + 1, len(batches) + len(by_path))
    return SecondOrder(grams, scores, orders)


def _walk(
    walker: BlockWalker,
    batch: Tensor,
    by_path: Mapping[str, CoupledGroup],
    grams: dict[str, Tensor],
    sensitivity: Tensor,
    ignored: Collection[int],
) -> None:
    """Add one micro-batch to the Gram matrices and to the blocks' sum over tokens of the squared gradient entry."""
    stream = walker.start(batch)
    inputs, hidden = [], stream.hidden
    for layer in range(len(walker.paths)):
        inputs.append(hidden)
        paths = _paths_in(by_path, layer)
        with capture(walker.model, paths) as seen:
            hidden = walker.run_block(layer, hidden, stream.contexts)
        for path, taken in seen.items():
            x = taken.input.flatten(0, -2).float()
            gram = grams.setdefault(by_path[path].name, x.new_zeros(x.shape[1], x.shape[1]))
            gram.addmm_(x.T, x)
    _, gradient = loss_and_gradient(walker, hidden, batch, ignored=ignored)
    predictions = batch.shape[1] - 1
    for layer in reversed(range(len(walker.paths))):
        sensitivity[layer] += float((gradient.double() * predictions).square().mean(-1).sum())
        if layer:
            gradient = walker.backward_block(layer, inputs.pop(), stream.contexts, gradient)


def _paths_in(by_path: Mapping[str, CoupledGroup], layer: int) -> list[str]:
    return [path for path, group in by_path.items() if group.layer == layer]
