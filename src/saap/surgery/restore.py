"""Cut and restore in one walk over the blocks.

Each block is finished before the next: its units are chosen, its consumers are refitted so that the residual stream
comes back to the dense one, and its members are cut. So one copy of the weights is enough: a block is still dense
when the dense stream passes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from saap.models.capture import Capture, capture, residual_gain
from saap.models.least_squares import Moments, removal_order, ridge_refit
from saap.models.linear import weight_out_in
from saap.models.masking import channel_mask
from saap.models.walker import BlockWalker, Contexts
from saap.records import CoupledGroup, FloatArray, ModelGraph, Role, StructurePlan
from saap.surgery.cut import cut_bundle, cut_group

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreSettings:
    """How the walk restores.

    ridges: tried for each matrix, relative to the mean of the Gram matrix' diagonal. held_share: part of the
    sequences that only judges the ridge. second_order: choose units by the pruned stream's Gram matrix at the plan's
    counts instead of taking the plan's own units. scores: by group, the importance of its units (units,), which that
    choice weighs in as well. micro_batch: sequences at a time.
    """

    ridges: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
    held_share: float = 0.125
    second_order: bool = True
    choice_ridge: float = 1e-2
    scores: Mapping[str, FloatArray] | None = None
    micro_batch: int = 4


@dataclass(slots=True)
class Restoration:
    """What the walk did.

    keep: the final kept units by group. errors: held-out error of each refitted matrix relative to that before.
    """

    keep: dict[str, tuple[int, ...]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Streams:
    """Hidden states of all sequences before the current block: in the dense and in the pruned model.

    one: contexts of a batch of one sequence, for trials.
    """

    one: Contexts
    contexts: list[Contexts]
    dense: list[Tensor]
    pruned: list[Tensor]


@dataclass(frozen=True, slots=True)
class _Consumer:
    """A linear module that reads the channels of a group, and the factor its output has in the residual stream.

    beside: the other groups of its bundle, whose channels the module reads too (query heads of other KV groups).
    """

    path: str
    module: nn.Module
    group: CoupledGroup
    gain: float | None
    beside: tuple[CoupledGroup, ...] = ()


@torch.no_grad()
def restore(
    model: nn.Module,
    graph: ModelGraph,
    plan: StructurePlan,
    tokens: Tensor,
    settings: RestoreSettings,
    progress: Progress | None = None,
) -> Restoration:
    """Choose, refit and cut, block by block, in place.

    tokens: (sequences, length) ids of the refit text. Groups inside blocks that the plan drops, and groups of the
    whole model, are left for `cut`. Every consumer is refitted, in pruned and in whole blocks, to the dense module's
    output plus the gap between the dense and the pruned residual stream so far.
    """
    walker = BlockWalker(model, graph.blocks)
    streams = _start(walker, tokens, settings.micro_batch)
    result = Restoration()
    for layer in range(len(graph.blocks)):
        if layer in plan.dropped_blocks:
            streams.dense = _run(walker, layer, streams.dense, streams.contexts)
        else:
            _restore_block(walker, graph, plan, layer, streams, settings, result)
        if progress is not None:
            progress(layer + 1, len(graph.blocks))
    return result


def _start(walker: BlockWalker, tokens: Tensor, micro_batch: int) -> _Streams:
    started = [walker.start(batch) for batch in torch.split(tokens, micro_batch)]
    hidden = [stream.hidden for stream in started]
    one = walker.start(tokens[:1]).contexts
    return _Streams(one, [stream.contexts for stream in started], hidden, list(hidden))


def _consumers(
    walker: BlockWalker, graph: ModelGraph, plan: StructurePlan, layer: int, streams: _Streams
) -> list[_Consumer]:
    """The block's consumers in the order in which they run."""
    # Query heads lie in the same channels as their KV groups: of the two, those that lose something.
    groups = [
        group for group in graph.in_block(layer) if group.role is not Role.QUERY or len(plan.kept(group)) < group.units
    ]
    by_path = {
        member.tensor.rpartition(".")[0]: group for group in groups for member in group.consumers if member.part is None
    }
    found = residual_gain(walker, layer, list(by_path), streams.dense[0][:1], streams.one)
    return [
        _Consumer(
            path, walker.model.get_submodule(path), by_path[path], gain,
            tuple(one for one in groups if one.bundle and one.bundle == by_path[path].bundle and one != by_path[path]),
        )
        for path, gain in found
    ]  # fmt: skip


def _restore_block(
    walker: BlockWalker,
    graph: ModelGraph,
    plan: StructurePlan,
    layer: int,
    streams: _Streams,
    settings: RestoreSettings,
    result: Restoration,
) -> None:
    whole = all(len(plan.kept(group)) == group.units for group in graph.in_block(layer))
    if whole and all(pruned is dense for pruned, dense in zip(streams.pruned, streams.dense, strict=True)):
        streams.dense = _run(walker, layer, streams.dense, streams.contexts)
        streams.pruned = list(streams.dense)
        return
    consumers = _consumers(walker, graph, plan, layer, streams)
    dense_next, dense_outputs = _dense_pass(walker, layer, consumers, streams)
    _cut_stacked(walker.model, graph, plan, layer, result)
    pruned_next = _refit_consumers(walker, layer, consumers, streams, dense_outputs, plan, settings, result)
    for group in graph.in_block(layer):
        if group.name not in result.keep:
            result.keep[group.name] = plan.kept(group)
            cut_group(walker.model, group, plan.kept(group))
    if pruned_next is None:
        pruned_next = _run(walker, layer, streams.pruned, streams.contexts)
    streams.dense, streams.pruned = dense_next, pruned_next


def _cut_stacked(model: nn.Module, graph: ModelGraph, plan: StructurePlan, layer: int, result: Restoration) -> None:
    """Cut stacked matrices (experts), which are not refitted, before what is refitted makes up for them."""
    bundles: dict[str, list[CoupledGroup]] = {}
    for group in graph.in_block(layer):
        if group.bundle and group.role is not Role.QUERY:
            bundles.setdefault(group.bundle, []).append(group)
    for groups in bundles.values():
        result.keep |= {group.name: plan.kept(group) for group in groups}
        if len(plan.kept(groups[0])) < groups[0].units:
            cut_bundle(model, groups, plan)
    for group in graph.in_block(layer):
        if group.role is Role.EXPERT:
            result.keep[group.name] = plan.kept(group)
            cut_group(model, group, plan.kept(group))


def _run(walker: BlockWalker, layer: int, hidden: Sequence[Tensor], contexts: Sequence[Contexts]) -> list[Tensor]:
    return [walker.run_block(layer, one, context) for one, context in zip(hidden, contexts, strict=True)]


def _dense_pass(
    walker: BlockWalker, layer: int, consumers: Sequence[_Consumer], streams: _Streams
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The dense block's output, and what each of its consumers puts out."""
    paths = [consumer.path for consumer in consumers]
    outputs: dict[str, list[Tensor]] = {path: [] for path in paths}
    dense_next = []
    for hidden, context in zip(streams.dense, streams.contexts, strict=True):
        with capture(walker.model, paths) as seen:
            dense_next.append(walker.run_block(layer, hidden, context))
        for path, one in seen.items():
            outputs[path].append(one.output)
    return dense_next, outputs


def _refit_consumers(
    walker: BlockWalker,
    layer: int,
    consumers: Sequence[_Consumer],
    streams: _Streams,
    dense_outputs: dict[str, list[Tensor]],
    plan: StructurePlan,
    settings: RestoreSettings,
    result: Restoration,
) -> list[Tensor] | None:
    """Refit one consumer after the other. Returns the block's new output where it follows without another run."""
    gap = [dense - pruned for dense, pruned in zip(streams.dense, streams.pruned, strict=True)]
    pruned_next: list[Tensor] | None = None
    for position, consumer in enumerate(consumers):
        last = position == len(consumers) - 1
        taken, outputs = _pruned_pass(walker, layer, consumer.path, streams, to_the_end=last)
        dense_here = dense_outputs.pop(consumer.path)
        targets = [_target(dense, opened, consumer.gain) for dense, opened in zip(dense_here, gap, strict=True)]
        new_outputs = _refit(walker.model, consumer, taken, targets, plan, settings, result)
        if consumer.gain is None:
            continue
        gap = [consumer.gain * (target - new) for target, new in zip(targets, new_outputs, strict=True)]
        if last and outputs is not None:
            pruned_next = [
                out + consumer.gain * (new - old.output)
                for out, new, old in zip(outputs, new_outputs, taken, strict=True)
            ]
    return pruned_next


def _target(dense: Tensor, gap: Tensor, gain: float | None) -> Tensor:
    """What the consumer should put out: the dense output, plus what the residual stream lacks where it adds to it."""
    return dense if gain is None else dense + gap / gain


def _pruned_pass(
    walker: BlockWalker, layer: int, path: str, streams: _Streams, *, to_the_end: bool
) -> tuple[list[Capture], list[Tensor] | None]:
    taken: list[Capture] = []
    outputs: list[Tensor] = []
    for hidden, context in zip(streams.pruned, streams.contexts, strict=True):
        with capture(walker.model, [path], stop=not to_the_end) as seen:
            outputs.append(walker.run_block(layer, hidden, context))
        taken.append(seen[path])
    return taken, outputs if to_the_end else None


def _refit(
    model: nn.Module,
    consumer: _Consumer,
    taken: Sequence[Capture],
    targets: Sequence[Tensor],
    plan: StructurePlan,
    settings: RestoreSettings,
    result: Restoration,
) -> list[Tensor]:
    """Choose the group's units, cut it, refit the consumer. Returns the consumer's new outputs, batch by batch."""
    weight = weight_out_in(consumer.module).float().clone()
    bias = consumer.module._parameters.get("bias")
    held_from = len(taken) - max(1, round(len(taken) * settings.held_share))
    extra = 0 if bias is None else 1
    fit, held = (Moments.empty(weight.shape[1] + extra, weight.shape[0], weight.device) for _ in range(2))
    for index, (seen, target) in enumerate(zip(taken, targets, strict=True)):
        x = _with_ones(seen.input.flatten(0, -2).float(), extra)
        moments = fit if index < held_from else held
        moments.add(x, target.flatten(0, -2).float())
    kept = _choose(consumer, weight, fit, held, plan, settings)
    columns = _kept_columns(consumer, kept, plan, weight.shape[1], weight.device)
    if consumer.beside:
        cut_bundle(model, [consumer.group, *consumer.beside], plan)
    elif kept != tuple(range(consumer.group.units)):
        cut_group(model, consumer.group, kept)
    result.keep |= {consumer.group.name: kept, **{one.name: plan.kept(one) for one in consumer.beside}}
    if not kept:  # nothing is left to refit: the module gives its bias
        gone = weight.new_zeros(weight.shape[0], 0)
        return [nn.functional.linear(seen.input[..., :0], gone.to(seen.input.dtype), bias) for seen in taken]
    with_bias = torch.cat([columns, torch.arange(extra, device=columns.device) + weight.shape[1]])
    start = torch.cat([weight, *([] if bias is None else [bias.float().unsqueeze(1)])], dim=1)[:, with_bias]
    new, error = ridge_refit(start, fit.select(with_bias), held.select(with_bias), settings.ridges)
    result.errors[consumer.path] = error
    weight_out_in(consumer.module).copy_(new[:, : len(columns)])
    if bias is not None:
        bias.copy_(new[:, -1])
    return [
        nn.functional.linear(seen.input[..., columns], new[:, : len(columns)].to(seen.input.dtype), bias)
        for seen in taken
    ]


def _with_ones(x: Tensor, extra: int) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if extra else x


def _kept_columns(
    consumer: _Consumer, kept: Sequence[int], plan: StructurePlan, channels: int, device: torch.device
) -> Tensor:
    """Input channels of the consumer that stay, ascending: (kept channels,)."""
    mask = channel_mask(consumer.group, kept, channels, f"{consumer.path}.weight")
    for one in consumer.beside:
        mask &= channel_mask(one, plan.kept(one), channels, f"{consumer.path}.weight")
    return mask.nonzero().flatten().to(device)


def _choose(
    consumer: _Consumer, weight: Tensor, fit: Moments, held: Moments, plan: StructurePlan, settings: RestoreSettings
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
        values = torch.as_tensor(settings.scores[group.name], device=weight.device)
        scores = values / values.mean().clamp_min(1e-30)
    gone, _ = removal_order(weight, gram, units, removed, ridge=settings.choice_ridge, at_once=at_once, scores=scores)
    return tuple(sorted(set(range(group.units)) - set(gone.tolist())))
