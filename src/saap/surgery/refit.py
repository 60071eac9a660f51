"""The refit of one matrix: which units of its group go, and what makes up for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from saap.core.errors import CalibrationError
from saap.core.records import CoupledGroup, FloatArray, StructurePlan
from saap.models.loading.precision import at_least_float32
from saap.models.structure.keep_index import KeepIndex
from saap.models.structure.least_squares import Moments, removal_order, ridge_refit
from saap.models.structure.linear import contracted_axis, weight_out_in
from saap.models.walk.offload import mark_changed
from saap.models.walk.processes import Processes
from saap.models.walk.residual import ResidualEntry
from saap.models.walk.spill import Tensors
from saap.surgery.cut import cut_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreSettings:
    """How the walk restores.

    ridges: tried for each matrix, relative to the mean of the Gram matrix' diagonal. held_share: part of the
    sequences that only judges the ridge (see `held_sequences`). second_order: choose units by the pruned stream's Gram
    matrix at the plan's counts instead of taking the plan's own units. scores: by group, the importance of its units
    (units,), which that choice weighs in as well. residual_target: aim at the dense residual stream, what it lacks so
    far included; False aims at the dense module's output alone, to measure the difference; tokens weigh the same in
    both. micro_batch: sequences at a time. products: the type in which the forward passes multiply matrices, None for
    that of the weights; moments and refits are of float32 and more.
    """

    ridges: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
    held_share: float = 0.125
    second_order: bool = True
    choice_ridge: float = 1e-2
    scores: Mapping[str, FloatArray] | None = None
    residual_target: bool = True
    micro_batch: int = 4
    products: torch.dtype | None = None


HELD_AT_LEAST = 4
"""Sequences that judge the ridge, where there are twice as many: fewer tell too little."""


def held_sequences(sequences: int, share: float) -> int:
    """How many of the sequences only judge the ridge; at least one stays to fit. sequences: two or more."""
    return max(round(sequences * share), min(HELD_AT_LEAST, sequences // 2))


def require_sequences(sequences: int) -> None:
    """Raise CalibrationError for a single sequence, of which none would be left to choose the ridge."""
    if sequences < 2:
        raise CalibrationError(
            f"The restoration has {sequences} sequence of text, but it fits on some and chooses the ridge on others",
            "Give more calibration text, or use --no-restore",
        )


@dataclass(slots=True)
class Restoration:
    """What the walk did.

    keep: the final kept units by group. errors: held-out error of each refitted matrix relative to that before.
    """

    keep: dict[str, tuple[int, ...]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Consumer:
    """A linear module that reads the channels of a group, and how its output enters the residual stream, if known.

    beside: the other groups of its bundle, whose channels the module reads too (query heads of other KV groups).
    """

    path: str
    module: nn.Module
    group: CoupledGroup
    entry: ResidualEntry | None
    beside: tuple[CoupledGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a consumer should put out, and how much each token's error weighs (..., 1), None for all the same."""

    targets: Tensors
    weights: Sequence[Tensor] | None


def refit(
    model: nn.Module,
    consumer: Consumer,
    processes: Processes,
    sequences: int,
    taken: Tensors,
    wanted: Wanted,
    plan: StructurePlan,
    settings: RestoreSettings,
    result: Restoration,
) -> Iterator[Tensor]:
    """Choose the group's units, cut it, refit the consumer. Returns the consumer's new outputs, batch by batch.

    sequences: of all processes. taken: what the consumer reads in the micro-batches of this one.
    """
    weight = weight_out_in(consumer.module).float().clone()
    bias = consumer.module._parameters.get("bias")
    extra = 0 if bias is None else 1
    fit, judging = _moments(weight, extra, processes, sequences, taken, wanted, settings)
    kept = processes.from_first(lambda: _choose(consumer, weight, fit, judging, plan, settings))
    keep = {consumer.group.name: kept, **{one.name: plan.kept(one) for one in consumer.beside}}
    columns = _kept_columns(consumer, keep, weight.device)
    cut_groups(model, [consumer.group, *consumer.beside], keep)
    result.keep |= keep
    if not kept:  # nothing is left to refit: the module gives its bias
        gone = weight.new_zeros(weight.shape[0], 0)
        return (_given(read[..., :0], gone, bias) for read in taken)
    with_bias = torch.cat([columns, torch.arange(extra, device=columns.device) + weight.shape[1]])
    start = torch.cat([weight, *([] if bias is None else [bias.float().unsqueeze(1)])], dim=1)[:, with_bias]
    fit = fit.select(with_bias)  # one after the other: both are large
    judging = judging.select(with_bias)
    new, error = start, 0.0
    if processes.first:
        new, error = ridge_refit(start, fit, judging, settings.ridges)
    new = processes.of_first(new)
    result.errors[consumer.path] = processes.from_first(lambda: error)
    weight_out_in(consumer.module).copy_(new[:, : len(columns)])
    if bias is not None:
        bias.copy_(new[:, -1])
    mark_changed(model, consumer.path)
    return (_given(read[..., columns], new[:, : len(columns)], bias) for read in taken)


def _given(read: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear module with these weights puts out, in at least float32: differences are taken of it."""
    read = at_least_float32(read)
    return nn.functional.linear(read, weight.to(read.dtype), None if bias is None else bias.to(read.dtype))


def _moments(
    weight: Tensor,
    extra: int,
    processes: Processes,
    sequences: int,
    taken: Tensors,
    wanted: Wanted,
    settings: RestoreSettings,
) -> tuple[Moments, Moments]:
    """Moments of the sequences to fit, and of those that only judge, over all processes."""
    held_from = sequences - held_sequences(sequences, settings.held_share)
    fit, judging = (Moments.empty(weight.shape[1] + extra, weight.shape[0], weight.device) for _ in range(2))
    own = processes.share(-(-sequences // settings.micro_batch))
    for place, (index, read, target) in enumerate(zip(own, taken, wanted.targets, strict=True)):
        x, t = _with_ones(read.flatten(0, -2).float(), extra), target.flatten(0, -2).float()
        if wanted.weights is not None:
            weights = wanted.weights[place].flatten(0, -2)
            x, t = x * weights, t * weights
        first = index * settings.micro_batch
        here = min(settings.micro_batch, sequences - first)
        fitted = len(x) * min(max(0, held_from - first), here) // here
        for moments, rows in ((fit, slice(fitted)), (judging, slice(fitted, None))):
            if len(x[rows]):
                moments.add(x[rows], t[rows])
    return _summed(fit, processes), _summed(judging, processes)


def _summed(moments: Moments, processes: Processes) -> Moments:
    """Moments over the tokens of all processes."""
    if processes.count == 1:
        return moments
    parts = processes.gathered((moments.energy, moments.tokens))
    return Moments(
        processes.total(moments.gram),
        processes.total(moments.cross),
        sum(energy for energy, _ in parts),
        sum(tokens for _, tokens in parts),
    )


def _with_ones(x: Tensor, extra: int) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if extra else x


def _kept_columns(consumer: Consumer, keep: Mapping[str, tuple[int, ...]], device: torch.device) -> Tensor:
    """Input channels of the consumer that stay, ascending: (kept channels,)."""
    tensor, axis = f"{consumer.path}.weight", contracted_axis(consumer.module)
    assert axis is not None
    shapes = {tensor: tuple(consumer.module.get_parameter("weight").shape)}
    index = KeepIndex(shapes, ((group, keep[group.name]) for group in (consumer.group, *consumer.beside)))
    return torch.from_numpy(index.axis(tensor, axis).kept()).to(device)


def _choose(
    consumer: Consumer, weight: Tensor, fit: Moments, held: Moments, plan: StructurePlan, settings: RestoreSettings
) -> tuple[int, ...]:
    group = consumer.group
    kept = plan.kept(group)
    removed = group.units - len(kept)
    if (
        consumer.beside
        or not settings.second_order
        or not removed
        or not kept
        or len({m.tensor for m in group.consumers}) != 1
    ):
        return kept
    rows = [[row for member in group.consumers for row in member.rows(unit)] for unit in range(group.units)]
    units = torch.tensor(rows, device=weight.device)
    channels = weight.shape[1]
    gram = fit.gram[:channels, :channels] + held.gram[:channels, :channels]
    at_once = 32 if units.shape[1] == 1 else 1
    scores = None
    if settings.scores is not None:
        values = torch.as_tensor(settings.scores[group.name])
        scores = (values / values.mean().clamp_min(1e-30)).to(weight)
    gone, _ = removal_order(weight, gram, units, removed, ridge=settings.choice_ridge, at_once=at_once, scores=scores)
    return tuple(group.others(gone.tolist()))
