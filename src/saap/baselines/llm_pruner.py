"""LLM-Pruner's importances (Ma, Fang and Wang 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models").

Unlike SAAP's, which are of each sample's loss and then averaged, they are of the averaged gradient: opposite gradients
of two samples cancel in the first-order terms. Deviation: both gradients come from one pass, one sample at a time,
instead of one pass each; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from saap.baselines.weights import along_axis, block_groups, scored_members, sum_members
from saap.core.records import FloatArray, ModelGraph
from saap.models.loading.precision import at_least_float32
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observation, Observer, Signal
from saap.models.walk.processes import Processes
from saap.models.walk.walk import walk


class Taylor(StrEnum):
    """Which terms count, in LLM-Pruner's words: vectorize, param_first, param_second, param_mix."""

    VECTOR = "vector"
    ELEMENT1 = "element1"
    ELEMENT2 = "element2"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class WeightGradients:
    """By tensor, float32: `mean`, the gradient of the mean loss; `square`, the mean over samples of its square."""

    mean: Mapping[str, Tensor]
    square: Mapping[str, Tensor]


class AveragedGradients(Observer):
    """Gradients of the scored weights of all decoder blocks; they take 8 bytes for each of these weights.

    The loss of a sample is the mean over its predicted tokens; a micro-batch must be one sample. samples: of all.
    """

    def __init__(self, graph: ModelGraph, samples: int) -> None:
        tensors = {member.tensor for group in block_groups(graph) for member in scored_members(graph, group)}
        self.needs = dict.fromkeys(sorted(tensors), Signal.WEIGHT_GRADIENT)
        self._share = 1 / samples
        self._mean: dict[str, Tensor] = {}
        self._square: dict[str, Tensor] = {}

    def observe(self, seen: Observation) -> None:
        """Add one sample's gradient of one weight."""
        gradient = at_least_float32(seen.dw)  # small addends would be lost in the sums of a bfloat16 model
        if seen.site not in self._mean:
            self._mean[seen.site], self._square[seen.site] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self._mean[seen.site].add_(gradient, alpha=self._share)
        self._square[seen.site].addcmul_(gradient, gradient, value=self._share)

    def merge(self, processes: Processes) -> None:
        """Sums over the samples of all processes."""
        self._mean = {name: processes.total(mean) for name, mean in self._mean.items()}
        self._square = {name: processes.total(square) for name, square in self._square.items()}

    def result(self) -> WeightGradients:
        """Both means."""
        return WeightGradients(self._mean, self._square)


def weight_gradients(backend: Backend, tokens: Tensor) -> WeightGradients:
    """Averaged gradients over `tokens` (samples, length): see `AveragedGradients`. Raises NonFiniteLossError."""
    gradients = AveragedGradients(backend.graph, len(tokens))
    walk(backend, tokens, [gradients], micro_batch=1)
    return gradients.result()


def taylor_channels(weight: Tensor, mean: Tensor, square: Tensor, axis: int, kind: Taylor) -> Tensor:
    """Importance of each channel along `axis` of one weight.

    weight, mean gradient, mean squared gradient: of one shape. vector: |sum_i w g|; element1: sum_i |w g|;
    element2: sum_i |w^2 h|; mixed: sum_i |w g - w^2 h / 2|. Returns (size of the axis,).
    """
    if kind is Taylor.VECTOR:
        return along_axis(weight * mean, axis).abs()
    if kind is Taylor.ELEMENT1:
        return along_axis((weight * mean).abs(), axis)
    if kind is Taylor.ELEMENT2:
        return along_axis(weight.square() * square, axis)
    return along_axis((weight * mean - 0.5 * weight.square() * square).abs(), axis)


@torch.no_grad()
def taylor_scores(
    model: nn.Module, graph: ModelGraph, gradients: WeightGradients, kind: Taylor
) -> dict[str, FloatArray]:
    """Importance of every unit: over its channels and members by sum, LLM-Pruner's default aggregation."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def channels(tensor: str, axis: int) -> Tensor:
        return taylor_channels(weights[tensor].float(), gradients.mean[tensor], gradients.square[tensor], axis, kind)

    return {
        group.name: sum_members(
            group, {member: channels(member.tensor, member.axis) for member in scored_members(graph, group)}
        )
        for group in block_groups(graph)
    }
