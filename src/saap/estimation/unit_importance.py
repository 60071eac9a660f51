"""The observer that scores every unit, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn

from saap.core.errors import NonFiniteLossError
from saap.core.records import FloatArray, GroupScores
from saap.estimation.importance import (
    aggregate,
    channel_change,
    element_importance,
    units_of,
    vector_importance,
    weight_product,
)
from saap.estimation.members import GroupParts, Part, ScoredParts
from saap.estimation.statistics import Moments, merge
from saap.models.structure.linear import contracted_axis
from saap.models.walk.observer import Batch, Needs, Observation, Observer, Signal
from saap.models.walk.processes import Processes
from saap.settings.prune import Aggregation, ElementOrder


@dataclass(frozen=True, slots=True)
class PartScores:
    """Signed sums of P and element-wise importance of one part in one micro-batch, both (samples, units)."""

    change: Tensor
    element: Tensor


class Scratch:
    """Two matrices of any needed shape, of which only the largest is ever allocated."""

    def __init__(self) -> None:
        self._stores: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def like(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices of the weight's shape in at least float32, which stay valid until the next call."""
        kind = torch.promote_types(weight.dtype, torch.float32)
        key = (kind, weight.device)
        if key not in self._stores or self._stores[key][0].numel() < weight.numel():
            self._stores.pop(key, None)
            self._stores[key] = (
                torch.empty(weight.numel(), dtype=kind, device=weight.device),
                torch.empty(weight.numel(), dtype=kind, device=weight.device),
            )
        first, second = (store[: weight.numel()].view(weight.shape) for store in self._stores[key])
        return first, second


class UnitImportance(Observer):
    """Vector-wise and element-wise importance of every unit: mean and spread over samples.

    Linear modules are scored from activations and their gradients, for all samples of a micro-batch; matrices in
    stacks from the gradient of the weight, which is a sum over samples, so that a micro-batch must be one of them.
    """

    def __init__(self, model: nn.Module, parts: ScoredParts, order: ElementOrder, aggregation: Aggregation) -> None:
        self._model, self._parts, self._order, self._aggregation = model, parts, order, aggregation
        self._scratch = Scratch()
        self._waiting: dict[tuple[str, int], dict[int, PartScores]] = {}
        self._moments: dict[str, Moments] = {}
        self._losses: list[FloatArray] = []
        stacks = dict.fromkeys([*parts.stacked, *parts.whole], Signal.WEIGHT_GRADIENT)
        self.needs: Needs = {path: self._signals(path) for path in parts.linear} | stacks

    def _signals(self, path: str) -> Signal:
        needed = Signal.INPUT | Signal.OUTPUT_GRADIENT
        consumers, producers = self._sides(path)
        if consumers:
            needed |= Signal.INPUT_GRADIENT
        return needed | Signal.OUTPUT if producers else needed

    def _sides(self, path: str) -> tuple[list[Part], list[Part]]:
        """Parts of a linear module that read their group's channels, and parts that make them."""
        contracted, parts = contracted_axis(self._model.get_submodule(path)), self._parts.linear[path]
        return [one for one in parts if one.axis == contracted], [one for one in parts if one.axis != contracted]

    def observe_loss(self, batch: Batch, losses: Tensor) -> None:
        """Keep the losses."""
        self._losses.append(losses.cpu().double().numpy())

    def observe(self, seen: Observation) -> None:
        """Score all parts of one module or stack, for the samples of one micro-batch."""
        site, predictions = seen.site, seen.batch.predictions
        scored: dict[tuple[str, int], PartScores] = {}
        if site in self._parts.linear:
            scored = self._linear_scores(seen)
        else:
            weight = self._model.get_parameter(site).detach()
            if site in self._parts.stacked:
                scored = stacked_scores(weight, seen.dw, self._parts.stacked[site], predictions, self._order)
            if site in self._parts.whole:
                scored[self._parts.whole[site]] = whole_scores(weight, seen.dw, predictions, self._order)
        for (group, position), scores in scored.items():
            self._waiting.setdefault((group, seen.batch.first), {})[position] = scores

    def _linear_scores(self, seen: Observation) -> dict[tuple[str, int], PartScores]:
        batch, site = seen.batch, seen.site
        consumers, producers = self._sides(site)
        x, dy = batch.by_sample(seen.x, site), batch.by_sample(seen.dy, site)
        elements = self._elements(seen, x, dy)
        scored = {}
        if consumers:
            change = channel_change(x, batch.by_sample(seen.dx, site))
            for part in consumers:
                scored[part.group, part.position] = PartScores(
                    units_of(change, part.channels), units_of(elements[part.axis], part.channels)
                )
        if producers:
            change = channel_change(batch.by_sample(seen.y, site), dy)
            bias = self._model.get_submodule(site).bias
            bias_change = dy.sum(1, dtype=change.dtype) * bias if isinstance(bias, Tensor) else None
            change = change if bias_change is None else change - bias_change
            for part in producers:
                of_part, element = units_of(change, part.channels), units_of(elements[part.axis], part.channels)
                if part.biases is not None and bias_change is not None:
                    of_part = of_part + units_of(bias_change, part.biases)
                    element = element + units_of(self._bias_elements(bias_change, batch), part.biases)
                scored[part.group, part.position] = PartScores(of_part, element)
        return scored

    def _elements(self, seen: Observation, x: Tensor, dy: Tensor) -> dict[int, Tensor]:
        """Element-wise importance of the channels along each needed axis of the weight, (samples, channels)."""
        module = self._model.get_submodule(seen.site)
        weight, contracted = module.get_parameter("weight"), contracted_axis(module)
        product, scratch = self._scratch.like(weight)
        axes = {part.axis for part in self._parts.linear[seen.site]}
        result = {axis: product.new_empty(len(x), weight.shape[axis]) for axis in axes}
        for sample in range(len(x)):
            weight_product(weight, x[sample], dy[sample], contracted or 0, product)
            for axis, rows in result.items():
                rows[sample] = element_importance(product, seen.batch.predictions, self._order, axis, scratch)
        return result

    def _bias_elements(self, change: Tensor, batch: Batch) -> Tensor:
        """Element-wise importance of each element of a bias. change: P of it; both (samples, channels)."""
        product = change.reshape(-1, 1)
        scratch = torch.empty_like(product)
        return element_importance(product, batch.predictions, self._order, 0, scratch).view_as(change)

    def leave_block(self, layer: int, batch: Batch) -> None:
        """Add the scores of groups that are complete to the statistics."""
        for name, group in self._parts.groups.items():
            if group.first_block == layer:
                parts = self._waiting.pop((name, batch.first), {})
                self._add(name, _group_scores(parts, group, len(batch.tokens), self._aggregation), batch.first)

    def _add(self, name: str, scores: tuple[FloatArray, FloatArray], first: int) -> None:
        for offset, (vector, element) in enumerate(zip(*scores, strict=True)):
            if not (np.isfinite(vector).all() and np.isfinite(element).all()):
                raise NonFiniteLossError(
                    f"The importance of {name} for calibration sample {first + offset} is not a finite number",
                    "Compute in float32 (--dtype float32) and check the text of that sample",
                )
            sample = Moments.of(vector, element)
            self._moments[name] = merge(self._moments[name], sample) if name in self._moments else sample

    def merge(self, processes: Processes) -> None:
        """Moments over the samples of all processes; one without samples has none."""
        found = processes.gather((self._moments, self._losses))
        self._losses = [losses for _, parts in found for losses in parts]
        every = [moments for moments, _ in found if moments]
        self._moments = {name: reduce(merge, [one[name] for one in every]) for name in self._parts.groups}

    def result(self) -> tuple[FloatArray, dict[str, GroupScores]]:
        """Losses of all samples, and the statistics of every group."""
        return np.concatenate(self._losses), {name: one.scores for name, one in self._moments.items()}


def stacked_scores(
    weight: Tensor, gradient: Tensor, parts: Mapping[int, Sequence[Part]], predictions: int, order: ElementOrder
) -> dict[tuple[str, int], PartScores]:
    """Scores of all parts in one stacked weight for one sample, by group and position of the part.

    weight, gradient: (experts, rows, columns), gradient = dL_n/dW of the sample's loss. An expert that no token of the
    sample went to has no gradient and scores zero, so that the mean over samples counts how often it is used.
    predictions: tokens that the loss is the mean over.
    """
    kind = torch.promote_types(weight.dtype, torch.float32)
    found: dict[tuple[str, int], PartScores] = {}
    for place, here in parts.items():
        product = weight[place].to(kind) * gradient[place].to(kind)
        scratch = torch.empty_like(product)
        for part in here:
            change = product.sum(1 - part.axis).unsqueeze(0)
            element = element_importance(product, predictions, order, part.axis, scratch).unsqueeze(0)
            found[part.group, part.position] = PartScores(
                units_of(change, part.channels), units_of(element, part.channels)
            )
    return found


def whole_scores(weight: Tensor, gradient: Tensor, predictions: int, order: ElementOrder) -> PartScores:
    """Scores of each matrix of a stacked weight as one unit, for one sample; arguments as in `stacked_scores`.

    Sums over all elements of the matrix, so an expert that few tokens go to has little of either.
    """
    kind = torch.promote_types(weight.dtype, torch.float32)
    changes, elements = [], []
    for matrix, slope in zip(weight, gradient, strict=True):
        product = (matrix.to(kind) * slope.to(kind)).reshape(1, -1)
        changes.append(product.sum(1))
        elements.append(element_importance(product, predictions, order, 0, torch.empty_like(product)))
    return PartScores(torch.cat(changes).unsqueeze(0), torch.cat(elements).unsqueeze(0))


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
