"""Second-order cost of every unit: what its removal costs the loss once the others have compensated for it.

A walk collects, for the module that reads a group's channels, the Gram matrix of its inputs, each token weighted by the
sensitivity of the loss to the module's output there: tokens differ in both by orders of magnitude. The greedy removal
order on it gives the squared error of each further unit; half of that is a loss change in nats, comparable over layers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saap.core.records import FloatArray, IntArray, ModelGraph, Role
from saap.models.structure.keep_index import sole_consumers, unit_channels
from saap.models.structure.least_squares import removal_order
from saap.models.structure.linear import weight_out_in
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observation, Observer, Signal
from saap.models.walk.processes import Processes

CURVE_STEPS = 32
"""Batches in which the units of a module are removed: fine enough for the decrements of a plan."""


@dataclass(frozen=True, slots=True)
class SecondOrder:
    """What the walk found, by group.

    grams: of the inputs of the group's consumer, (channels, channels), each token weighted by the sensitivity of the
    loss there; none with spilled activations. scores: cost of each unit in nats per token, given that all cheaper ones
    of its module are removed. orders: units in the order of removal.
    """

    grams: Mapping[str, Tensor]
    scores: Mapping[str, FloatArray]
    orders: Mapping[str, IntArray]


def gram_bytes(graph: ModelGraph, roles: Collection[Role]) -> int:
    """Memory of the Gram matrices of all groups of these roles that have costs."""
    members = [group.consumers[0] for group in sole_consumers(graph, roles).values()]
    return sum(4 * graph.shapes[member.tensor][member.axis] ** 2 for member in members)


class WeightedGrams(Observer):
    """Gram matrices of what the consumers of groups read, and the order of removal that follows from each.

    A token weighs as much as the mean squared entry, at the module's output, of its own summed-loss gradient. With
    spilled activations the units are put in order, and the matrix freed, while their block's weights are in memory.
    """

    def __init__(self, backend: Backend, tokens: Tensor, roles: Collection[Role] = tuple(Role)) -> None:
        self._backend, self._tokens = backend, tokens
        self._groups = sole_consumers(backend.graph, roles)
        self._grams = {} if backend.spill is not None else {path: self._empty(path) for path in self._groups}
        self._removed: dict[str, tuple[Tensor, Tensor]] = {}
        self.needs = dict.fromkeys(self._groups, Signal.INPUT | Signal.OUTPUT_GRADIENT)

    def _weight(self, path: str) -> Tensor:
        return weight_out_in(self._backend.model.get_submodule(path))

    def _empty(self, path: str) -> Tensor:
        weight = self._weight(path)
        return torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)

    def observe(self, seen: Observation) -> None:
        """Add one module's tokens."""
        gradient = seen.dy.flatten(0, -2).float() * seen.batch.predictions
        x = seen.x.flatten(0, -2).float() * gradient.square().mean(-1, keepdim=True).sqrt()
        if seen.site not in self._grams:
            self._grams[seen.site] = self._empty(seen.site)
        self._grams[seen.site].addmm_(x.T, x)

    def close_block(self, layer: int) -> None:
        """Put the units of a block in order."""
        for path, group in self._groups.items():
            if group.layer == layer and path in self._grams:
                self._removed[path] = self._order(path, self._grams.pop(path))

    def _order(self, path: str, gram: Tensor) -> tuple[Tensor, Tensor]:
        """The units of a group in the order of removal, and the weighted squared error of each."""
        group, weight = self._groups[path], self._weight(path)
        units = unit_channels(group.consumers[0], group.units, weight.device)
        at_once = max(1, group.units // CURVE_STEPS)
        return removal_order(weight, gram / self._tokens.numel(), units, group.units, at_once=at_once)

    def merge(self, processes: Processes) -> None:
        """Sum the matrices over all processes."""
        self._grams = {path: processes.total(gram) for path, gram in self._grams.items()}

    @torch.no_grad()
    def result(self) -> SecondOrder:
        """The matrices that are left, the costs and the orders; each process puts a part of the modules in order."""
        processes, ordered = self._backend.processes, {}
        own = processes.share(len(self._grams))
        walked = len(processes.share(len(self._tokens)))
        for done, path in enumerate(list(self._grams)[own.start : own.stop], walked + 1):
            ordered[path] = self._order(path, self._grams[path])
            self._backend.progress(done, walked + len(own))
        self._removed |= {path: found for part in processes.gather(ordered) for path, found in part.items()}
        scores, orders = {}, {}
        for path, group in self._groups.items():
            order, costs = self._removed[path]
            nats = torch.empty_like(costs)
            nats[order] = 0.5 * costs
            scores[group.name], orders[group.name] = nats.cpu().numpy(), order.cpu().numpy()
        return SecondOrder({self._groups[path].name: gram for path, gram in self._grams.items()}, scores, orders)
