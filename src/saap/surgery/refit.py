"""Least-squares reconstruction of one matrix: which units of its group stay, and the weights that compensate."""

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
from saap.models.walk.backend import Backend
from saap.models.walk.consumers import unit_channels
from saap.models.walk.offload import mark_changed
from saap.models.walk.residual import ResidualEntry
from saap.models.walk.spill import Tensors
from saap.surgery.cut import cut_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreSettings:
    """How the reconstruction works.

    ridges: tried for each matrix, relative to the mean of the Gram matrix' diagonal. held_share: part of the
    sequences that only chooses the ridge (see `held_out_sequences`). second_order: choose units by the pruned stream's
    Gram matrix at the plan's counts instead of taking the plan's own units. scores: by group, the importance of its
    units (units,), which that choice weighs in as well. residual_target: aim at the dense residual stream, what it
    lacks so far included; False aims at the dense module's output alone, to measure the difference; tokens weigh the
    same in both. micro_batch: sequences at a time.
    """

    ridges: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
    held_share: float = 0.125
    second_order: bool = True
    choice_ridge: float = 1e-2
    scores: Mapping[str, FloatArray] | None = None
    residual_target: bool = True
    micro_batch: int = 4


HELD_OUT_AT_LEAST = 4
"""Sequences that choose the ridge, where there are twice as many: fewer tell too little."""


def held_out_sequences(sequences: int, share: float) -> int:
    """How many of the sequences only choose the ridge; at least one stays to fit. sequences: two or more."""
    return max(round(sequences * share), min(HELD_OUT_AT_LEAST, sequences // 2))


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

    keep: the final kept units by group. errors: held-out error of each new matrix relative to that before.
    """

    keep: dict[str, tuple[int, ...]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Consumer:
    """A linear module that reads the channels of a group, and how its output enters the residual stream, if known.

    bundle: the other groups of the group's bundle, whose channels it reads too (query heads of other KV groups).
    """

    path: str
    module: nn.Module
    group: CoupledGroup
    entry: ResidualEntry | None
    bundle: tuple[CoupledGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class ReconstructionTarget:
    """What a consumer should give, and how much each token's error weighs (..., 1), None for all the same."""

    outputs: Tensors
    weights: Sequence[Tensor] | None


@dataclass(frozen=True, slots=True)
class Refit:
    """Chooses the units of one consumer after the other, and fits its matrix. sequences: of all processes."""

    backend: Backend
    plan: StructurePlan
    settings: RestoreSettings
    sequences: int
    result: Restoration = field(default_factory=Restoration)

    def fit(self, consumer: Consumer, inputs: Tensors, target: ReconstructionTarget) -> Iterator[Tensor]:
        """Choose the group's units, cut it, fit the consumer. Returns the consumer's new outputs, batch by batch.

        inputs: what the consumer reads in the micro-batches of this process.
        """
        model, processes, group = self.backend.model, self.backend.processes, consumer.group
        weight = weight_out_in(consumer.module).float().clone()
        bias = consumer.module._parameters.get("bias")
        fit, held_out = self._moments(weight, bias, inputs, target)
        kept = processes.broadcast_result(lambda: self._choose(consumer, weight, fit, held_out))
        keep = {group.name: kept, **{one.name: self.plan.kept(one) for one in consumer.bundle}}
        columns = _kept_columns(consumer, keep, weight.device)
        cut_groups(model, [group, *consumer.bundle], keep)
        self.result.keep |= keep
        if not kept:  # nothing is left to fit: the module gives its bias
            nothing = weight.new_zeros(weight.shape[0], 0)
            return (_given(x[..., :0], nothing, bias) for x in inputs)
        start, chosen = weight, columns
        if bias is not None:
            start = torch.cat([weight, bias.float().unsqueeze(1)], dim=1)
            chosen = torch.cat([columns, columns.new_tensor([weight.shape[1]])])
        start = start[:, chosen]
        fit = fit.select(chosen)  # one after the other: both are large
        held_out = held_out.select(chosen)
        new, error = start, 0.0
        if processes.first:
            new, error = ridge_refit(start, fit, held_out, self.settings.ridges)
        new = processes.broadcast(new)
        self.result.errors[consumer.path] = processes.broadcast_result(lambda: error)
        weight_out_in(consumer.module).copy_(new[:, : len(columns)])
        if bias is not None:
            bias.copy_(new[:, -1])
        mark_changed(model, consumer.path)
        return (_given(x[..., columns], new[:, : len(columns)], bias) for x in inputs)

    def _moments(
        self, weight: Tensor, bias: Tensor | None, inputs: Tensors, target: ReconstructionTarget
    ) -> tuple[Moments, Moments]:
        """Moments of the sequences to fit on, and of those that are held out, over all processes."""
        at_once, extra = self.settings.micro_batch, 0 if bias is None else 1
        held_out_from = self.sequences - held_out_sequences(self.sequences, self.settings.held_share)
        fit, held_out = (Moments.empty(weight.shape[1] + extra, weight.shape[0], weight.device) for _ in range(2))
        own = self.backend.processes.share(-(-self.sequences // at_once))
        for place, (index, read, output) in enumerate(zip(own, inputs, target.outputs, strict=True)):
            x, t = read.flatten(0, -2).float(), output.flatten(0, -2).float()
            if bias is not None:
                x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            if target.weights is not None:
                weights = target.weights[place].flatten(0, -2)
                x, t = x * weights, t * weights
            here = min(at_once, self.sequences - index * at_once)
            fitted = len(x) * min(max(0, held_out_from - index * at_once), here) // here
            for moments, rows in ((fit, slice(fitted)), (held_out, slice(fitted, None))):
                if len(x[rows]):
                    moments.add(x[rows], t[rows])
        return self._summed(fit), self._summed(held_out)

    def _summed(self, moments: Moments) -> Moments:
        """Moments over the tokens of all processes."""
        processes = self.backend.processes
        if processes.count == 1:
            return moments
        parts = processes.gather((moments.energy, moments.tokens))
        return Moments(
            processes.total(moments.gram),
            processes.total(moments.cross),
            sum(energy for energy, _ in parts),
            sum(tokens for _, tokens in parts),
        )

    def _choose(self, consumer: Consumer, weight: Tensor, fit: Moments, held_out: Moments) -> tuple[int, ...]:
        """The units that stay: the plan's own, or as many by second-order cost."""
        group, settings = consumer.group, self.settings
        kept = self.plan.kept(group)
        removed = group.units - len(kept)
        alone = not consumer.bundle and len({member.tensor for member in group.consumers}) == 1
        if not (alone and settings.second_order and removed and kept):
            return kept
        units = torch.cat([unit_channels(member, group.units, weight.device) for member in group.consumers], dim=1)
        channels = weight.shape[1]
        gram = fit.gram[:channels, :channels] + held_out.gram[:channels, :channels]
        scores = None
        if settings.scores is not None:
            values = torch.as_tensor(settings.scores[group.name])
            scores = (values / values.mean().clamp_min(1e-30)).to(weight)
        at_once = 32 if units.shape[1] == 1 else 1
        order, _ = removal_order(
            weight, gram, units, removed, ridge=settings.choice_ridge, at_once=at_once, scores=scores
        )
        return tuple(group.others(order.tolist()))


def _kept_columns(consumer: Consumer, keep: Mapping[str, tuple[int, ...]], device: torch.device) -> Tensor:
    """Input channels of the consumer that stay, ascending: (kept channels,)."""
    tensor, axis = f"{consumer.path}.weight", contracted_axis(consumer.module)
    assert axis is not None
    shapes = {tensor: tuple(consumer.module.get_parameter("weight").shape)}
    index = KeepIndex(shapes, ((group, keep[group.name]) for group in (consumer.group, *consumer.bundle)))
    return torch.from_numpy(index.axis(tensor, axis).kept()).to(device)


def _given(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear module with these weights gives, in at least float32: differences are taken of it."""
    x = at_least_float32(x)
    return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
