"""Activation-based baselines that share one forward pass: Wanda-sp, FLAP, block influence."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saap.baselines.baseline import Baseline, block_groups, score_units
from saap.core.records import AxisSlice, CoupledGroup, FloatArray, ModelGraph, Role
from saap.models.loading.precision import widened
from saap.models.structure.linear import weight_out_in
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observation, Observer, Signal
from saap.models.walk.processes import Processes
from saap.models.walk.walk import walk
from saap.settings.prune import PrunableRole, SkipLayers
from saap.settings.registry import Strategy

MICRO_BATCH = 4


class ActivationStatistics(Observer):
    """Input statistics by module path of a consumer: `mean` and `square`, the means of x and x^2, (channels,).

    influence: 1 - mean cosine of a block's input and output, (blocks,).
    """

    def __init__(self, graph: ModelGraph) -> None:
        members = [member for group in block_groups(graph) for member in group.consumers]
        modules = dict.fromkeys((member.tensor.rpartition(".")[0] for member in members), Signal.INPUT)
        self.needs = modules | dict.fromkeys(graph.blocks, Signal.INPUT | Signal.OUTPUT)
        self._blocks = graph.blocks
        self._sums: dict[str, tuple[Any, int]] = {}
        self.mean: dict[str, Tensor] = {}
        self.square: dict[str, Tensor] = {}
        self.influence: FloatArray = np.zeros(len(graph.blocks))

    def observe(self, seen: Observation) -> None:
        """Add the tokens of one module, or of one block."""
        if seen.site in self._blocks:
            before, after = seen.x.to(seen.y.device).float(), seen.y.float()
            cosines = widened(nn.functional.cosine_similarity(before, after, dim=-1))
            self._add(seen.site, cosines.sum(), seen.batch.tokens.numel())
        else:
            x = widened(seen.x.flatten(0, -2))
            self._add(seen.site, torch.stack([x.sum(0), x.square().sum(0)]), len(x))

    def _add(self, site: str, total: Tensor, count: int) -> None:
        before, number = self._sums.get(site, (0.0, 0))
        self._sums[site] = before + total, number + count

    def merge(self, processes: Processes) -> None:
        """Means over the tokens of all processes."""
        parts, self._sums = processes.gather(self._sums), {}
        for part in parts:
            for site, found in part.items():
                self._add(site, *found)
        for site, (total, count) in self._sums.items():
            if site in self._blocks:
                self.influence[self._blocks.index(site)] = 1 - float(total) / count
            else:
                self.mean[site], self.square[site] = total / count


def activations(backend: Backend, tokens: Tensor) -> ActivationStatistics:
    """Collect the statistics in one forward walk over `tokens` (samples, length)."""
    found = ActivationStatistics(backend.graph)
    walk(backend, tokens, [found], micro_batch=MICRO_BATCH, backward=False)
    return found


def wanda_channels(weight: Tensor, square: Tensor) -> Tensor:
    """Wanda-sp's metric of each input channel: mean_i |W_ij| times the root mean square of input j.

    weight: (out, in). square: (in,). Returns (in,).
    Source: Wanda (Sun et al. 2024) summed over structures, as FLAP (An et al. 2024) describes the baseline Wanda-sp.
    """
    return widened(weight).abs().mean(0) * square.sqrt()


def wanda_scores(backend: Backend, found: ActivationStatistics, seed: int) -> dict[str, FloatArray]:
    """Wanda-sp: the metric summed over each unit's channels.

    Deviation: all modules are scored on the dense model's activations. The published code prunes each layer before it
    scores the next.
    """

    def channels(group: CoupledGroup, member: AxisSlice, weight: Tensor) -> Tensor:
        return wanda_channels(weight.movedim(member.axis, 1), found.square[member.tensor.rpartition(".")[0]])

    return score_units(backend, channels, consumers=True)


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

    As in the published code, the fluctuations of attention are squared first. The score is multiplied by the unit's
    parameters: our global ranking compares scores per parameter, FLAP compares standardised fluctuations.
    """

    def channels(group: CoupledGroup, member: AxisSlice, weight: Tensor) -> Tensor:
        path = member.tensor.rpartition(".")[0]
        fluctuation = flap_channels(weight.movedim(member.axis, 1), found.mean[path], found.square[path])
        return standardised(fluctuation.square() if group.role is Role.ATTENTION else fluctuation)

    scores = {}
    for name, values in score_units(backend, channels, consumers=True).items():
        group = backend.graph.group(name)
        width = sum(member.width for member in group.consumers)
        scores[name] = values / width * group.parameters_per_unit(backend.graph.shapes)
    return scores


def compensating_biases(
    backend: Backend, found: ActivationStatistics, keep: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """FLAP's bias compensation: the mean output of the removed channels, by module path of a dense consumer.

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
    """Block influence (ShortGPT, Men et al. 2024), 1 - cos(input, output) of a block, in equal parts to its units."""
    groups = block_groups(backend.graph)
    units = Counter[int]()
    for group in groups:
        units[group.layer] += group.units
    return {one.name: np.full(one.units, found.influence[one.layer] / units[one.layer]) for one in groups}


WANDA_SP = Baseline(scores=wanda_scores, measure=activations, skip_layers=SkipLayers())
FLAP = Baseline(
    scores=flap_scores, measure=activations, strategy=Strategy.IMPORTANCE, skip_layers=SkipLayers(),
    compensation=compensating_biases,
)  # fmt: skip
BLOCK_INFLUENCE = Baseline(
    scores=influence_scores, measure=activations, skip_layers=SkipLayers(), roles=(PrunableRole.BLOCK,)
)
