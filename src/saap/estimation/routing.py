"""Router frequency: how often each expert is selected. A forward pass is enough."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saap.core.errors import UnsupportedModelError
from saap.core.records import CoupledGroup, ModelGraph, Role
from saap.estimation.importance import Scoring
from saap.estimation.statistics import ScoreObserver
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observation, Signal

OTHER_SCORE = "Use --importance token-fisher"


def experts_module(graph: ModelGraph, group: CoupledGroup) -> str:
    """Path of the module that holds the stacked matrices of a group of experts. Raises UnsupportedModelError."""
    stacks = [member.tensor for member in group.members if len(graph.shapes[member.tensor]) > 2]
    paths = {name.rpartition(".")[0] for name in stacks if group.role is Role.EXPERT}
    if len(paths) != 1:
        raise UnsupportedModelError(f"{group.name} is not a stack of experts in one module", OTHER_SCORE)
    return paths.pop()


class RouterFrequency(ScoreObserver):
    """Share of a sample's tokens that are routed to each expert: (samples, experts), summing to the experts per token.

    The module of a layer's experts is called with the tokens, (tokens, width), and the numbers and gates of the experts
    of each token, both (tokens, experts per token).
    """

    backward = False

    def __init__(self, backend: Backend, groups: Sequence[CoupledGroup]) -> None:
        super().__init__(groups)
        self._model = backend.model
        self._groups = {experts_module(backend.graph, group): group for group in groups}
        self.needs = dict.fromkeys(self._groups, Signal.INPUT | Signal.OUTPUT)

    def observe(self, seen: Observation) -> None:
        """Count the tokens of each expert of one layer."""
        self.add(self._groups[seen.site].name, seen.batch, self.mean(seen, torch.ones(chosen(seen).shape)))

    def mean(self, seen: Observation, values: Tensor) -> Tensor:
        """Mean over each sample's tokens of a value of each chosen expert, (tokens, experts per token), 0 for others.

        Returns (samples, experts).
        """
        units = self._groups[seen.site].units
        numbers = chosen(seen).clamp(max=units)  # beyond them are experts without weights
        of_all = values.new_zeros(len(numbers), units + 1).scatter_add_(1, numbers.to(values.device), values)
        return seen.batch.by_sample(of_all[:, :units], seen.site).mean(1)


def chosen(seen: Observation) -> Tensor:
    """Numbers of the experts of each token, (tokens, experts per token). Raises UnsupportedModelError without them."""
    found = [one for one in seen.arguments[1:] if isinstance(one, Tensor) and one.dim() == 2]
    numbers = next((one for one in found if not one.is_floating_point()), None)
    if numbers is None or not any(one.is_floating_point() and one.shape == numbers.shape for one in found):
        raise UnsupportedModelError(
            f"{seen.site} is not called with the experts of each token and their gates", OTHER_SCORE
        )
    return numbers


FREQUENCY = Scoring(observer=RouterFrequency)
