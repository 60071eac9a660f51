"""What a walk over the text tells the methods that look at activations: Wanda-sp, FLAP, block influence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saap.baselines.weights import block_groups, of_units
from saap.core.records import AxisSlice, CoupledGroup, FloatArray, ModelGraph, Role
from saap.models.loading.precision import widened
from saap.models.structure.linear import weight_out_in
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observation, Observer, Signal
from saap.models.walk.processes import Processes
from saap.models.walk.walk import walk

MICRO_BATCH = 4


@dataclass(frozen=True, slots=True)
class ActivationStatistics:
    """By module path of a consumer: `mean` and `square`, the mean of its inputs and of their squares, (channels,).

    influence: 1 - mean cosine of a block's input and output, (blocks,).
    """

    mean: Mapping[str, Tensor]
    square: Mapping[str, Tensor]
    influence: FloatArray


class ActivationObserver(Observer):
    """Collects the statistics in one forward walk."""

    def __init__(self, graph: ModelGraph) -> None:
        members = [member for group in block_groups(graph) for member in group.consumers]
        modules = dict.fromkeys((member.tensor.rpartition(".")[0] for member in members), Signal.INPUT)
        self.needs = modules | dict.fromkeys(graph.blocks, Signal.INPUT | Signal.OUTPUT)
        self._blocks = graph.blocks
        self._sums: dict[str, tuple[Any, ...]] = {}

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
        """Sums over the tokens of all processes."""
        parts = processes.gather(self._sums)
        self._sums = {}
        for part in parts:
            for site, values in part.items():
                self._add(site, *values)

    def result(self) -> ActivationStatistics:
        """The means."""
        modules = {site: values for site, values in self._sums.items() if site not in self._blocks}
        cosines = [self._sums[block] for block in self._blocks]
        return ActivationStatistics(
            mean={path: first / count for path, (first, _, count) in modules.items()},
            square={path: second / count for path, (_, second, count) in modules.items()},
            influence=1 - np.array([total / count for total, count in cosines]),
        )


def activation_statistics(backend: Backend, tokens: Tensor) -> ActivationStatistics:
    """One forward walk over `tokens` (samples, length), for all methods that look at activations."""
    found = ActivationObserver(backend.graph)
    walk(backend, tokens, [found], micro_batch=MICRO_BATCH, backward=False)
    return found.result()


def wanda_channels(weight: Tensor, square: Tensor) -> Tensor:
    """Wanda-sp's metric of each input channel: mean_i |W_ij| times the root mean square of input j.

    weight: (out, in). square: (in,). Returns (in,).
    Source: Wanda (Sun et al. 2024) summed over structures, as FLAP (An et al. 2024) describes the baseline Wanda-sp.
    """
    return widened(weight).abs().mean(0) * square.sqrt()


def flap_channels(weight: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """FLAP's weighted input fluctuation of each input channel: variance of input j times sum_i W_ij^2.

    weight: (out, in). mean, square: (in,). Returns (in,). Source: An et al. 2024 (WIFV).
    """
    return (square - mean.square()).clamp_min(0) * widened(weight).square().sum(0)


def standardised(values: Tensor) -> Tensor:
    """(values - mean) / standard deviation over a module's channels, 0 where they are all equal (FLAP)."""
    deviation = values - values.mean()
    scale = values.std()
    return deviation / scale if float(scale) > 0 else torch.zeros_like(values)


def wanda_scores(model: nn.Module, graph: ModelGraph, found: ActivationStatistics) -> dict[str, FloatArray]:
    """Wanda-sp: the metric summed over each unit's channels.

    Deviation: all modules are scored on the dense model's activations, the published code goes on from each pruned
    layer.
    """
    return _consumer_scores(model, graph, found, lambda _, weight, mean, square: wanda_channels(weight, square))


def flap_scores(model: nn.Module, graph: ModelGraph, found: ActivationStatistics) -> dict[str, FloatArray]:
    """FLAP: the fluctuation standardised over each module's channels, then its mean over a unit's channels.

    As in its published code, the fluctuations of attention are squared first. Times the unit's parameters, since the
    global ranking that takes it compares scores per parameter, while FLAP's compares the standardised fluctuations.
    """

    def metric(role: Role, weight: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        fluctuation = flap_channels(weight, mean, square)
        return standardised(fluctuation.square() if role is Role.ATTENTION else fluctuation)

    scores = _consumer_scores(model, graph, found, metric)
    return {
        name: values / _width(graph.group(name)) * graph.group(name).parameters_per_unit(graph.shapes)
        for name, values in scores.items()
    }


def influence_scores(graph: ModelGraph, found: ActivationStatistics) -> dict[str, FloatArray]:
    """Block influence (ShortGPT, Men et al. 2024): every unit of a block has the block's 1 - cos(input, output)."""
    return {group.name: np.full(group.units, found.influence[group.layer]) for group in block_groups(graph)}


def compensating_biases(
    model: nn.Module, graph: ModelGraph, keep: Mapping[str, tuple[int, ...]], means: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """FLAP's bias compensation: what the removed channels put out on average, by module path of a dense consumer.

    means: of the consumers' inputs. Each bias is sum_{j removed} W_ij mean_j, (out,), float32.
    """
    biases: dict[str, Tensor] = {}
    for group in block_groups(graph):
        kept = keep.get(group.name)
        if kept is None or len(kept) == group.units:
            continue
        removed = group.others(kept)
        for member in group.consumers:
            path = member.tensor.rpartition(".")[0]
            weight = widened(weight_out_in(model.get_submodule(path)).detach())
            index = torch.tensor(member.indices(removed), device=weight.device)
            bias = weight[:, index] @ means[path].to(weight)[index]
            biases[path] = biases.get(path, torch.zeros_like(bias, dtype=torch.float32)) + bias.float()
    return biases


@torch.no_grad()
def add_biases(model: nn.Module, biases: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Add to the biases of linear modules, in place. Returns the names of biases that had not been there."""
    made = []
    for path, bias in biases.items():
        module = model.get_submodule(path)
        present = module._parameters.get("bias")
        if present is not None:
            present.add_(bias.to(present))
        else:
            weight = module.get_parameter("weight")
            module.register_parameter("bias", nn.Parameter(bias.to(weight), requires_grad=weight.requires_grad))
            made.append(f"{path}.bias")
    return tuple(made)


def _width(group: CoupledGroup) -> int:
    return sum(member.width for member in group.consumers)


def _consumer_scores(
    model: nn.Module,
    graph: ModelGraph,
    found: ActivationStatistics,
    metric: Callable[[Role, Tensor, Tensor, Tensor], Tensor],
) -> dict[str, FloatArray]:
    """Sum over the units' input channels in all consumers. metric: of (role, weight, mean, square) by input channel."""

    def of(member: AxisSlice, group: CoupledGroup) -> Tensor:
        path = member.tensor.rpartition(".")[0]
        weight = weight_out_in(model.get_submodule(path)).detach()
        channels = metric(group.role, weight, found.mean[path], found.square[path])
        return of_units(channels, member, group.units).cpu()

    return {
        group.name: torch.stack([of(member, group) for member in group.consumers]).sum(0).numpy()
        for group in block_groups(graph)
        if group.consumers
    }
