"""REAP: what the tokens routed to an expert get from it. A forward pass is enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saap.core.records import FloatArray, GroupScores
from saap.estimation.importance import Scoring
from saap.estimation.routing import RouterFrequency, chosen
from saap.models.loading.precision import at_least_float32
from saap.models.walk.observer import Observation


class Reap(RouterFrequency):
    """Mean over the tokens routed to an expert of its gate times the norm of its output; 0 without such tokens.

    The experts of a layer run again for one of each token's choices at a time, so nothing of their form is assumed.
    Source: REAP (Lasby et al. 2025, arXiv 2510.13999).
    """

    def observe(self, seen: Observation) -> None:
        """Measure share and mean output of each expert of one layer."""
        outputs = outputs_by_choice(self._model, seen.site, seen.arguments)
        total = torch.stack([torch.linalg.vector_norm(output, dim=-1) for output in outputs], 1)
        share, total = (self.mean(seen, values) for values in (torch.ones_like(total), total))
        for name, own in self._groups[seen.site].items():
            self.add(name, seen.batch, total[:, own], share[:, own])

    def result(self) -> tuple[FloatArray, dict[str, GroupScores]]:
        """Losses, of which there are none, and the scores of all groups."""
        losses, found = super().result()
        return losses, {name: per_routed_token(one) for name, one in found.items()}


def outputs_by_choice(model: nn.Module, site: str, arguments: Sequence[Any]) -> Iterator[Tensor]:
    """For the first, second ... choice of each token: gate times output of that expert, (tokens, width).

    arguments: that the module of the experts is called with. Raises UnsupportedModelError.
    """
    numbers, experts = chosen(site, arguments), model.get_submodule(site)
    for place in range(numbers.shape[1]):
        output: Tensor = experts(*(_one_choice(one, numbers, place) for one in arguments))
        yield at_least_float32(output).flatten(0, -2)


def _one_choice(argument: object, numbers: Tensor, place: int) -> object:
    same = isinstance(argument, Tensor) and argument.shape == numbers.shape
    return argument[:, place : place + 1] if same else argument  # type: ignore[index]


def per_routed_token(scores: GroupScores) -> GroupScores:
    """Means over routed tokens, from those over all tokens: element / vector, with its variance to first order.

    element: of the output, vector: of the choice itself. Units without tokens score zero.
    """
    share = np.where(scores.vector > 0, scores.vector, np.inf)
    mean = scores.element / share
    squares = scores.element_m2 - 2 * mean * scores.comoment + mean**2 * scores.vector_m2
    m2 = np.maximum(squares, 0) / share**2
    return GroupScores(vector=mean, vector_m2=m2, element=mean, element_m2=m2, comoment=m2)


REAP = Scoring(observer=Reap)
