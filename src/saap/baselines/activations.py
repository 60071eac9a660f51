"""What a walk over the text tells the methods that look at activations: Wanda-sp, FLAP, block influence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from saap.baselines.weights import block_groups, of_units
from saap.core.records import AxisSlice, CoupledGroup, FloatArray, ModelGraph, Role
from saap.models.loading.precision import widened
from saap.models.structure.linear import weight_out_in
from saap.models.walk.capture import capture
from saap.models.walk.walker import BlockWalker, inference_only

MICRO_BATCH = 4


@dataclass(frozen=True, slots=True)
class ActivationStatistics:
    """By module path of a consumer: `mean` and `square`, the mean of its inputs and of their squares, (channels,).

    influence: 1 - mean cosine of a block's input and output, (blocks,).
    """

    mean: Mapping[str, Tensor]
    square: Mapping[str, Tensor]
    influence: FloatArray


@torch.no_grad()
def activation_statistics(
    model: nn.Module, graph: ModelGraph, tokens: Tensor, progress: Callable[[int, int], None] | None = None
) -> ActivationStatistics:
    """One forward walk over `tokens` (samples, length)."""
    paths: dict[int, list[str]] = {}
    for group in block_groups(graph):
        for member in group.consumers:
            path = member.tensor.rpartition(".")[0]
            paths.setdefault(group.layer, [])
            if path not in paths[group.layer]:
                paths[group.layer].append(path)
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    cosines = np.zeros(len(graph.blocks))
    walker = BlockWalker(model, graph.blocks)
    batches = torch.split(tokens, MICRO_BATCH)
    with inference_only(model):
        for index, batch in enumerate(batches):
            stream = walker.start(batch)
            hidden = stream.hidden
            for layer in range(len(walker.paths)):
                with capture(model, paths.get(layer, [])) as seen:
                    after = walker.run_block(layer, hidden, stream.contexts)
                before = hidden.to(after.device).float()
                cosines[layer] += float(widened(nn.functional.cosine_similarity(before, after.float(), dim=-1)).sum())
                for path, taken in seen.items():
                    inputs = widened(taken.input.flatten(0, -2))
                    first, second, count = sums.get(path, (0.0, 0.0, 0))
                    sums[path] = (first + inputs.sum(0), second + inputs.square().sum(0), count + len(inputs))
                hidden = after
            if progress is not None:
                progress(index + 1, len(batches))
    return ActivationStatistics(
        mean={path: first / count for path, (first, _, count) in sums.items()},
        square={path: second / count for path, (_, second, count) in sums.items()},
        influence=1 - cosines / tokens.numel(),
    )


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
