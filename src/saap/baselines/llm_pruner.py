"""LLM-Pruner's importances (Ma, Fang and Wang 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models").

Unlike SAAP's, which are of each sample's loss and then averaged, they are of the averaged gradient: opposite gradients
of two samples cancel in the first-order terms. Deviation: both gradients come from one pass, one sample at a time,
instead of one pass each; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from saap.baselines.weights import along_axis, block_groups, scored_members, sum_members
from saap.core.records import FloatArray, ModelGraph
from saap.models.loading.precision import at_least_float32
from saap.models.walk.layerwise import inputs_of_blocks
from saap.models.walk.loss import loss_and_gradient
from saap.models.walk.walker import BlockWalker, inference_only


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


@torch.no_grad()
def weight_gradients(
    model: nn.Module, graph: ModelGraph, tokens: Tensor, progress: Callable[[int, int], None] | None = None
) -> WeightGradients:
    """Gradients of the scored weights of all decoder blocks; they take 8 bytes for each of these weights.

    tokens: (samples, length). The loss of a sample is the mean over its predicted tokens. The model is left as it was.
    Raises NonFiniteLossError.
    """
    by_block: dict[int, set[str]] = {}
    for group in block_groups(graph):
        for member in scored_members(graph, group):
            by_block.setdefault(graph.block_of(member.tensor), set()).add(member.tensor)
    parameters = dict(model.named_parameters())
    mean: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    walker = BlockWalker(model, graph.blocks)
    with inference_only(model):
        for sample in range(len(tokens)):
            for name, gradient in _sample_gradients(walker, tokens[sample : sample + 1], sample, by_block, parameters):
                # small addends would be lost in the sums of a bfloat16 model
                gradient = at_least_float32(gradient)
                if name not in mean:
                    mean[name], square[name] = torch.zeros_like(gradient), torch.zeros_like(gradient)
                mean[name].add_(gradient, alpha=1 / len(tokens))
                square[name].addcmul_(gradient, gradient, value=1 / len(tokens))
            if progress is not None:
                progress(sample + 1, len(tokens))
    return WeightGradients(mean, square)


def _sample_gradients(
    walker: BlockWalker,
    tokens: Tensor,
    sample: int,
    by_block: Mapping[int, set[str]],
    parameters: Mapping[str, nn.Parameter],
) -> list[tuple[str, Tensor]]:
    stream = walker.start(tokens)
    inputs, hidden = inputs_of_blocks(walker, stream)
    _, gradient = loss_and_gradient(walker, hidden, tokens, first_sample=sample)
    found: list[tuple[str, Tensor]] = []
    for layer in reversed(range(len(walker.paths))):
        weights = {name: parameters[name] for name in sorted(by_block.get(layer, ()))}
        gradient, gradients = walker.backward_to_weights(layer, inputs.pop(), stream.contexts, gradient, weights)
        found += gradients.items()
    return found


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
