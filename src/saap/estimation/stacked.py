"""Scores of units in stacked tensors (experts), from the gradient of the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saap.estimation.importance import element_importance, units_of
from saap.estimation.observers import Part, PartScores
from saap.settings.prune import ElementOrder


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
