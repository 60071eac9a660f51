"""The observer of SAAP's importance: selects the scored weights of the coupled groups, and scores them in a walk."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import or_

import torch
from torch import Tensor, nn

from saap.core.errors import UnsupportedModelError
from saap.core.records import AxisSlice, CoupledGroup, ModelGraph, Role, Side
from saap.estimation.importance import ElementScore, aggregate, channel_change, vector_importance, weight_product
from saap.estimation.statistics import ScoreObserver
from saap.models.loading.precision import at_least_float32
from saap.models.structure.keep_index import unit_channels, units_of
from saap.models.structure.linear import contracted_axis, owner
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Batch, Observation, Signal
from saap.settings.prune import Aggregation

PartScores = tuple[Tensor, Tensor]
"""Signed sums of P and element-wise importance of one part in one micro-batch, both (samples, units)."""


@dataclass(frozen=True, slots=True)
class Part:
    """One member of one group: channels of a matrix, with their biases if those are removed too.

    position: among the group's parts. channels, biases: (units, width) indices of the matrix' axis and of the bias.
    consumes: whether it consumes the group's channels. place: index of the matrix in a stacked tensor; None if the
    matrices themselves are the units.
    """

    group: str
    position: int
    axis: int
    channels: Tensor
    consumes: bool
    place: int | None = None
    biases: Tensor | None = None


@dataclass(frozen=True, slots=True)
class GroupParts:
    """The parts of one group. last: index of the last consumer. first_block: its last block in the backward walk."""

    units: int
    count: int
    last: int
    first_block: int


class UnitImportance(ScoreObserver):
    """Vector-wise and element-wise importance of every unit.

    Scores members in linear-like modules inside decoder blocks (weights, with the biases of the same channels) and
    members in stacked tensors. Norms, embeddings and the head are not scored. Linear modules are scored from
    activations and their gradients, for all samples of a micro-batch. Stacked matrices are scored from the weight
    gradient, which is a sum over samples. A group without any scored member raises UnsupportedModelError.
    """

    def __init__(
        self, backend: Backend, groups: Sequence[CoupledGroup], element: ElementScore, aggregation: Aggregation
    ) -> None:
        super().__init__(groups)
        self._model, self._element, self._aggregation = backend.model, element, aggregation
        self._parts: dict[str, list[Part]] = {}
        self._groups = {group.name: self._find_parts(backend.graph, group) for group in groups}
        self._products: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._waiting: dict[tuple[str, int], dict[int, PartScores]] = {}
        self.needs = {site: _signals(site in backend.graph.shapes, parts) for site, parts in self._parts.items()}
        self.one_by_one = any(Signal.WEIGHT_GRADIENT in signals for signals in self.needs.values())

    def _find_parts(self, graph: ModelGraph, group: CoupledGroup) -> GroupParts:
        members = [member for member in group.members if _is_scored(self._model, graph, group, member)]
        if not members:
            raise UnsupportedModelError(
                f"{group.name} has no member in a linear module, so its units cannot be scored",
                "Leave out its role with --roles",
            )
        last, whole = 0, group.role is Role.EXPERT
        for position, member in enumerate(members):
            device = self._model.get_parameter(member.tensor).device
            path, consumes, biases = member.tensor.rpartition(".")[0], member.side is Side.CONSUMER, None
            last = position if consumes or whole else last
            bias = dataclasses.replace(member, tensor=f"{path}.bias", axis=0)
            if not consumes and bias in group.members:
                biases = unit_channels(bias, group.units, device)
            channels = unit_channels(member, group.units, device)
            axis = member.axis if member.part is None else member.axis - 1
            site = path if member.part is None and not whole else member.tensor
            part = Part(group.name, position, axis, channels, consumes, member.part, biases)
            self._parts.setdefault(site, []).append(part)
        return GroupParts(group.units, len(members), last, min(graph.block_of(one.tensor) for one in members))

    def observe(self, seen: Observation) -> None:
        """Score all parts of one module or stack, for the samples of one micro-batch."""
        stacked = Signal.WEIGHT_GRADIENT in self.needs[seen.site]
        for part, scores in self._in_stack(seen) if stacked else self._in_linear(seen):
            self._waiting.setdefault((part.group, seen.batch.first), {})[part.position] = scores

    def _in_linear(self, seen: Observation) -> Iterator[tuple[Part, PartScores]]:
        batch, parts, module = seen.batch, self._parts[seen.site], self._model.get_submodule(seen.site)
        x, dy = batch.by_sample(seen.x, seen.site), batch.by_sample(seen.dy, seen.site)
        elements = self._elements(module, seen, x, dy)
        changes: dict[bool, Tensor] = {}  # of consumed and of produced channels
        of_bias = None
        if any(part.consumes for part in parts):
            changes[True] = channel_change(x, batch.by_sample(seen.dx, seen.site))
        if not all(part.consumes for part in parts):
            changes[False] = channel_change(batch.by_sample(seen.y, seen.site), dy)
            if isinstance(module.bias, Tensor):
                of_bias = dy.sum(1, dtype=changes[False].dtype) * module.bias
                changes[False] = changes[False] - of_bias
        for part in parts:
            change = units_of(changes[part.consumes], part.channels)
            element = units_of(elements[part.axis], part.channels)
            if part.biases is not None and of_bias is not None:
                change = change + units_of(of_bias, part.biases)
                bias_elements = self._element(of_bias.reshape(-1, 1), batch.predictions, 0).view_as(of_bias)
                element = element + units_of(bias_elements, part.biases)
            yield part, (change, element)

    def _elements(self, module: nn.Module, seen: Observation, x: Tensor, dy: Tensor) -> dict[int, Tensor]:
        """Element-wise importance of the channels along each needed axis of the weight, (samples, channels)."""
        weight, contracted = module.get_parameter("weight"), contracted_axis(module)
        product = self._product_like(weight)
        axes = {part.axis for part in self._parts[seen.site]}
        result = {axis: product.new_empty(len(x), weight.shape[axis]) for axis in axes}
        for sample in range(len(x)):
            weight_product(weight, x[sample], dy[sample], contracted or 0, product)
            for axis, rows in result.items():
                rows[sample] = self._element(product, seen.batch.predictions, axis)
        return result

    def _product_like(self, weight: Tensor) -> Tensor:
        """Buffer for P of a weight; only the largest one is ever allocated."""
        key = (torch.promote_types(weight.dtype, torch.float32), weight.device)
        if key not in self._products or self._products[key].numel() < weight.numel():
            self._products.pop(key, None)
            self._products[key] = torch.empty(weight.numel(), dtype=key[0], device=key[1])
        return self._products[key][: weight.numel()].view(weight.shape)

    def _in_stack(self, seen: Observation) -> Iterator[tuple[Part, PartScores]]:
        """Scores of channels in the matrices of a stack (experts, rows, columns), or of each matrix as one unit.

        An expert that gets no token of the sample has no gradient and scores zero, so the mean over samples reflects
        how often the expert is used.
        """
        weight, predictions = self._model.get_parameter(seen.site).detach(), seen.batch.predictions

        @lru_cache(maxsize=1)
        def product(place: int) -> Tensor:
            found = at_least_float32(weight[place]) * at_least_float32(seen.dw[place])
            return found.reshape(len(found), -1)  # of a bias too

        for part in sorted(self._parts[seen.site], key=lambda part: part.place or 0):
            if part.place is None:
                flat = (product(place).reshape(1, -1) for place in part.channels.flatten().tolist())
                both = [(one.sum(1), self._element(one, predictions, 0)) for one in flat]
                yield part, (torch.cat([change for change, _ in both])[None], torch.cat([one for _, one in both])[None])
            else:
                change = product(part.place).sum(1 - part.axis)
                element = self._element(product(part.place), predictions, part.axis)
                yield part, (units_of(change[None], part.channels), units_of(element[None], part.channels))

    def leave_block(self, layer: int, batch: Batch) -> None:
        """Add the scores of groups that are complete to the statistics."""
        for name, group in self._groups.items():
            if group.first_block == layer:
                parts = self._waiting.pop((name, batch.first), {})
                # a part that did not run (an expert without tokens) scores zero
                nothing = torch.zeros(len(batch.tokens), group.units, dtype=torch.float64)
                every = (parts.get(position, (nothing, nothing)) for position in range(group.count))
                both = (torch.stack([one.cpu().double() for one in each]) for each in zip(*every, strict=True))
                changes, elements = both
                vector = vector_importance(changes, self._aggregation, group.last)
                self.add(name, batch, aggregate(elements, self._aggregation, group.last), vector)


def _is_scored(model: nn.Module, graph: ModelGraph, group: CoupledGroup, member: AxisSlice) -> bool:
    if group.role is Role.EXPERT:
        return len(graph.shapes[member.tensor]) > 2
    module, attribute = owner(model, member.tensor)
    linear = attribute == "weight" and contracted_axis(module) is not None
    return graph.block_of(member.tensor) >= 0 and (linear or member.part is not None)


def _signals(stacked: bool, parts: Sequence[Part]) -> Signal:
    if stacked:
        return Signal.WEIGHT_GRADIENT
    of_channels = {Signal.INPUT_GRADIENT if part.consumes else Signal.OUTPUT for part in parts}
    return reduce(or_, of_channels, Signal.INPUT | Signal.OUTPUT_GRADIENT)
