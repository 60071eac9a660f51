"""Definition of a baseline, its measurements on the dense model, and the weights of its units."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.records import AxisSlice, CoupledGroup, FloatArray, ModelGraph, Role
from saap.models.structure.keep_index import unit_channels, units_of
from saap.models.walk.backend import Backend
from saap.settings.prune import PrunableRole, SkipLayers
from saap.settings.registry import Strategy

Scores = Mapping[str, FloatArray]
"""By group, one number for each unit; units of low score are removed first."""
Measure = Callable[[Backend, Tensor], Any]
"""A pass of the dense model over tokens (samples, length)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One published method.

    scores: function of the dense model, the result of `measure`, and a seed. strategy: how the budget is shared.
    skip_layers: None protects the first and last layers as LLM-Pruner does (4 and 2 of 30). roles: None lets the caller
    choose. compensation: biases in place of a reconstruction, by path of their module, from the dense model, the
    measurements and the kept units. scored: roles whose units it can score; EXPERT implies that it scores stacked
    matrices too. bytes_per_weight: memory of the pass for each weight of the blocks.
    """

    scores: Callable[[Backend, Any, int], Scores]
    measure: Measure | None = None
    strategy: Strategy = Strategy.UNIFORM
    skip_layers: SkipLayers | None = None
    roles: tuple[PrunableRole, ...] | None = None
    compensation: Callable[[Backend, Any, Mapping[str, tuple[int, ...]]], dict[str, Tensor]] | None = None
    scored: frozenset[Role] = frozenset({Role.FFN, Role.ATTENTION})
    bytes_per_weight: int = 0


@dataclass(frozen=True, slots=True)
class Measurements:
    """Measurements that baselines made on the dense model; each pass over the text runs only once.

    tokens: (samples, length) ids, the calibration samples of the method under test.
    """

    backend: Backend
    tokens: Tensor
    seed: int = 0
    _made: dict[Measure, Any] = field(default_factory=dict)

    def of(self, baseline: Baseline) -> Any:
        """The baseline's measurements; runs the pass unless that was done before."""
        if baseline.measure is None:
            return None
        if baseline.measure not in self._made:
            self._made[baseline.measure] = baseline.measure(self.backend, self.tokens)
        return self._made[baseline.measure]

    def keep_only(self, baselines: Iterable[Baseline | None]) -> None:
        """Forget what none of these baselines reads."""
        for measure in self._made.keys() - {one.measure for one in baselines if one is not None}:
            del self._made[measure]

    def scores(self, baseline: Baseline) -> Scores:
        """The baseline's scores, by group."""
        return baseline.scores(self.backend, self.of(baseline), self.seed)


def scored_members(graph: ModelGraph, group: CoupledGroup) -> list[AxisSlice]:
    """Scored matrices of the group, all inside decoder blocks. As in LLM-Pruner, biases and norms are not scored."""
    return [one for one in group.members if len(graph.shapes[one.tensor]) > 1 and graph.block_of(one.tensor) >= 0]


def block_groups(graph: ModelGraph) -> list[CoupledGroup]:
    """Groups inside decoder blocks that have scored matrices; stacked experts are left out."""
    return [group for group in graph.groups if group.layer >= 0 and not group.bundle and scored_members(graph, group)]


@torch.no_grad()
def score_units(
    backend: Backend, channels: Callable[[CoupledGroup, AxisSlice, Tensor], Tensor], *, consumers: bool = False
) -> dict[str, FloatArray]:
    """Scores of the units of all groups in blocks, summed over their members, or only over the consumers.

    channels: of a group, a member and its weight, one value for each index of the member's axis.
    """
    scores: dict[str, FloatArray] = {}
    for group in block_groups(backend.graph):
        members = group.consumers if consumers else scored_members(backend.graph, group)
        total = torch.zeros(group.units, dtype=torch.float64)
        for member in members:
            values = channels(group, member, backend.model.get_parameter(member.tensor))
            total += units_of(values.cpu().double(), unit_channels(member, group.units))
        if members:
            scores[group.name] = total.numpy()
    return scores


def along_axis(values: Tensor, axis: int) -> Tensor:
    """Sum over all other axes. values: of two axes or more. Returns (size of the axis,)."""
    return values.sum(dim=[other for other in range(values.ndim) if other != axis])


@torch.no_grad()
def add_biases(model: nn.Module, biases: Mapping[str, Tensor]) -> int:
    """Add to the biases of linear modules, in place. Returns the number of new parameters."""
    added = 0
    for path, bias in biases.items():
        module, present = model.get_submodule(path), getattr(model.get_submodule(path), "bias", None)
        if isinstance(present, Tensor):
            present.add_(bias.to(present))
        else:
            # A module without weights, of which nothing was kept, takes after the others.
            like = next(module.parameters(), next(model.parameters()))
            module.bias = nn.Parameter(bias.to(like), requires_grad=like.requires_grad)
            added += bias.numel()
    return added
