"""Router frequency: how often each expert is selected. A forward pass is enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saap.core.errors import UnsupportedModelError
from saap.core.records import AxisSlice, CoupledGroup, IntArray, ModelGraph, Role
from saap.estimation.importance import Scoring
from saap.estimation.statistics import ScoreObserver
from saap.models.structure.routing import experts_and_gates
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observation, Signal

OTHER_SCORE = "Use --importance token-fisher"


def stack_of(graph: ModelGraph, group: CoupledGroup) -> AxisSlice:
    """Where a group's experts are among the stacked matrices of a module. Raises UnsupportedModelError."""
    stacks = [member for member in group.members if len(graph.shapes[member.tensor]) > 2 and member.axis == 0]
    if group.role is not Role.EXPERT or len({module_of(one.tensor) for one in stacks}) != 1:
        raise UnsupportedModelError(f"{group.name} is not a stack of experts in one module", OTHER_SCORE)
    return stacks[0]


def module_of(tensor: str) -> str:
    """Path of the module that a tensor belongs to."""
    return tensor.rpartition(".")[0]


class RouterFrequency(ScoreObserver):
    """Share of a sample's tokens that are routed to each expert: (samples, experts), summing to the experts per token.

    The module of a layer's experts is called with the tokens, (tokens, width), and the numbers and gates of the experts
    of each token, both (tokens, experts per token). Several groups share it where a router first selects among groups.
    """

    backward = False

    def __init__(self, backend: Backend, groups: Sequence[CoupledGroup]) -> None:
        super().__init__(groups)
        self._model = backend.model
        self._groups: dict[str, dict[str, IntArray]] = {}
        self._experts: dict[str, int] = {}
        for group in groups:
            stack = stack_of(backend.graph, group)
            site = module_of(stack.tensor)
            self._groups.setdefault(site, {})[group.name] = stack.indices(range(group.units))
            self._experts[site] = backend.graph.shapes[stack.tensor][0]
        self.needs = dict.fromkeys(self._groups, Signal.INPUT | Signal.OUTPUT)

    def observe(self, seen: Observation) -> None:
        """Count the tokens of each expert of one layer."""
        share = self.mean(seen, torch.ones(chosen(seen.site, seen.arguments).shape))
        for name, own in self._groups[seen.site].items():
            self.add(name, seen.batch, share[:, own])

    def mean(self, seen: Observation, values: Tensor) -> Tensor:
        """Mean over each sample's tokens of a value of each chosen expert, (tokens, experts per token), 0 for others.

        Returns (samples, experts).
        """
        experts = self._experts[seen.site]
        numbers = chosen(seen.site, seen.arguments).clamp(max=experts)  # beyond them are experts without weights
        of_all = values.new_zeros(len(numbers), experts + 1).scatter_add_(1, numbers.to(values.device), values)
        return seen.batch.by_sample(of_all[:, :experts], seen.site).mean(1)


def chosen(site: str, arguments: Sequence[Any]) -> Tensor:
    """Numbers of the experts of each token, (tokens, experts per token). Raises UnsupportedModelError without them."""
    found = experts_and_gates(arguments)
    if found is None:
        raise UnsupportedModelError(f"{site} is not called with the experts of each token and their gates", OTHER_SCORE)
    return found[0]


FREQUENCY = Scoring(observer=RouterFrequency)
