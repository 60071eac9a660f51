"""Baselines that look at activations, all by one forward pass: Wanda-sp, FLAP, block influence."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from saap.baselines.baseline import Baseline, block_groups
from saap.core.records import CoupledGroup, FloatArray, ModelGraph, Role
from saap.models.loading.precision import widened
from saap.models.structure.keep_index import unit_channels, units_of
from saap.models.structure.linear import weight_out_in
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observation, Observer, Signal
from saap.models.walk.processes import Processes
from saap.models.walk.walk import walk
from saap.settings.prune import PrunableRole, SkipLayers
from saap.settings.registry import Strategy

MICRO_BATCH = 4


class ActivationStatistics(Observer):
    """By module path of a consumer: `mean` and `square`, the mean of its inputs and of their squares, (channels,).

    influence: 1 - mean cosine of a block's input and output, (blocks,).
    """

    def __init__(self, graph: ModelGraph) -> None:
        members = [member for group in block_groups(graph) for member in group.consumers]
        modules = dict.fromkeys((member.tensor.rpartition(".")[0] for member in members), Signal.INPUT)
        self.needs = modules | dict.fromkeys(graph.blocks, Signal.INPUT | Signal.OUTPUT)
        self._blocks = graph.blocks
        self._sums: dict[str, tuple[Any, ...]] = {}
        self.mean: dict[str, Tensor] = {}
        self.square: dict[str, Tensor] = {}
        self.influence: FloatArray = np.zeros(len(graph.blocks))

    def observe(self, seen: Observation) -> None:
        """Add the tokens of one module, or of one block."""
        if seen.site in self._blocks:
            before, after = seen.x.to(seen.y.device).float(), seen.y.float()
            cosines = widened(nn.functional.cosine_similarity(before, after, dim=-1))
            self._add(seen.site, float(cosines.sum()), seen.batch.tokens.numel())
        else:
            x = widened(seen.x.flatten(0, -2))
            self._add(seen.site, x.sum(0), x.square().sum(0), len(x))

    def _add(self, site: str, *values: Tensor | float) -> None:
        before = self._sums.get(site, (0.0,) * len(values))
        self._sums[site] = tuple(sum(pair) for pair in zip(before, values, strict=True))

    def merge(self, processes: Processes) -> None:
        """Means over the tokens of all processes."""
        parts, self._sums = processes.gather(self._sums), {}
        for part in parts:
            for site, values in part.items():
                self._add(site, *values)
        for site, (*sums, count) in self._sums.items():
            if site in self._blocks:
                self.influence[self._blocks.index(site)] = 1 - sums[0] / count
            else:
                self.mean[site], self.square[site] = (one / count for one in sums)

    def result(self) -> Self:
        """The means."""
        return self


def activations(backend: Backend, tokens: Tensor) -> ActivationStatistics:
    """One forward walk over `tokens` (samples, length)."""
    found = ActivationStatistics(backend.graph)
    walk(backend, tokens, [found], micro_batch=MICRO_BATCH, backward=False)
    return found


def _consumer_scores(
    backend: Backend, channels: Callable[[CoupledGroup, str, Tensor], Tensor]
) -> dict[str, FloatArray]:
    """Sum over the units' input channels in all consumers. channels: of (group, path, weight), by input channel."""
    scores: dict[str, FloatArray] = {}
    for group in block_groups(backend.graph):
        found = []
        for member in group.consumers:
            path = member.tensor.rpartition(".")[0]
            weight = weight_out_in(backend.model.get_submodule(path)).detach()
            index = unit_channels(member, group.units, weight.device)
            found.append(units_of(channels(group, path, weight), index).cpu())
        if found:
            scores[group.name] = torch.stack(found).sum(0).numpy()
    return scores


def wanda_channels(weight: Tensor, square: Tensor) -> Tensor:
    """Wanda-sp's metric of each input channel: mean_i |W_ij| times the root mean square of input j.

    weight: (out, in). square: (in,). Returns (in,).
    Source: Wanda (Sun et al. 2024) summed over structures, as FLAP (An et al. 2024) describes the baseline Wanda-sp.
    """
    return widened(weight).abs().mean(0) * square.sqrt()


def wanda_scores(backend: Backend, found: ActivationStatistics, seed: int) -> dict[str, FloatArray]:
    """Wanda-sp: the metric summed over each unit's channels.

    Deviation: all modules are scored on the dense model's activations, the published code goes on from each pruned
    layer.
    """
    return _consumer_scores(backend, lambda _, path, weight: wanda_channels(weight, found.square[path]))


def flap_channels(weight: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """FLAP's weighted input fluctuation of each input channel: variance of input j times sum_i W_ij^2.

    weight: (out, in). mean, square: (in,). Returns (in,). Source: An et al. 2024 (WIFV).
    """
    return (square - mean.square()).clamp_min(0) * widened(weight).square().sum(0)


def standardised(values: Tensor) -> Tensor:
    """(values - mean) / standard deviation over a module's channels, 0 where they are all equal (FLAP)."""
    deviation, scale = values - values.mean(), values.std()
    return deviation / scale if float(scale) > 0 else torch.zeros_like(values)


def flap_scores(backend: Backend, found: ActivationStatistics, seed: int) -> dict[str, FloatArray]:
    """FLAP: the fluctuation standardised over each module's channels, then its mean over a unit's channels.

    As in its published code, the fluctuations of attention are squared first. Times the unit's parameters, since the
    global ranking that takes it compares scores per parameter, while FLAP's compares the standardised fluctuations.
    """

    def channels(group: CoupledGroup, path: str, weight: Tensor) -> Tensor:
        fluctuation = flap_channels(weight, found.mean[path], found.square[path])
        return standardised(fluctuation.square() if group.role is Role.ATTENTION else fluctuation)

    scores = {}
    for name, values in _consumer_scores(backend, channels).items():
        group = backend.graph.group(name)
        width = sum(member.width for member in group.consumers)
        scores[name] = values / width * group.parameters_per_unit(backend.graph.shapes)
    return scores


def compensating_biases(
    backend: Backend, found: ActivationStatistics, keep: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """FLAP's bias compensation: what the removed channels put out on average, by module path of a dense consumer.

    Each bias is sum_{j removed} W_ij mean_j, (out,), float32.
    """
    biases: dict[str, Tensor] = {}
    for group in block_groups(backend.graph):
        removed = group.others(keep.get(group.name, range(group.units)))
        for member in group.consumers if removed else ():
            path = member.tensor.rpartition(".")[0]
            weight = widened(weight_out_in(backend.model.get_submodule(path)).detach())
            index = torch.tensor(member.indices(removed), device=weight.device)
            bias = weight[:, index] @ found.mean[path].to(weight)[index]
            biases[path] = biases.get(path, torch.zeros_like(bias, dtype=torch.float32)) + bias.float()
    return biases


def influence_scores(backend: Backend, found: ActivationStatistics, seed: int) -> dict[str, FloatArray]:
    """Block influence (ShortGPT, Men et al. 2024): every unit of a block has the block's 1 - cos(input, output)."""
    return {group.name: np.full(group.units, found.influence[group.layer]) for group in block_groups(backend.graph)}


WANDA_SP = Baseline(scores=wanda_scores, measure=activations, skip_layers=SkipLayers())
FLAP = Baseline(
    scores=flap_scores, measure=activations, strategy=Strategy.IMPORTANCE, skip_layers=SkipLayers(),
    compensation=compensating_biases,
)  # fmt: skip
BLOCK_INFLUENCE = Baseline(
    scores=influence_scores, measure=activations, skip_layers=SkipLayers(), roles=(PrunableRole.BLOCK,)
)
