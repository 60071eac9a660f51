"""Cut and restore in one walk over the blocks.

Each block is finished before the next: its units are chosen, its consumers are refitted so that the residual stream
comes back to the dense one, and its members are cut. So one copy of the weights is enough: a block is still dense
when the dense stream passes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from saap.models.capture import capture
from saap.models.least_squares import Moments, removal_order, ridge_refit
from saap.models.linear import weight_out_in
from saap.models.masking import channel_mask
from saap.models.offload import mark_changed
from saap.models.processes import Processes
from saap.models.residual import ResidualEntry, residual_ways
from saap.models.spill import NewTensors, Spill, Tensors, held
from saap.models.walked import passed, started
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
    choice weighs in as well. residual_target: aim at the dense residual stream, what it lacks so far included; False
    aims at the dense module's output alone, to measure the difference. micro_batch: sequences at a time.
    """

    ridges: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
    held_share: float = 0.125
    second_order: bool = True
    choice_ridge: float = 1e-2
    scores: Mapping[str, FloatArray] | None = None
    residual_target: bool = True
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
    """Hidden states before the current block, in the dense and in the pruned model, of this process' micro-batches.

    one: contexts of a batch of one sequence, for trials. batches: of all processes. new: makes a sequence of tensors,
    one for each batch. apart: whether the two models differ.
    """

    processes: Processes
    batches: int
    new: NewTensors
    one: Contexts
    contexts: list[Contexts]
    dense: Tensors
    pruned: Tensors
    apart: bool = False


@dataclass(frozen=True, slots=True)
class _Consumer:
    """A linear module that reads the channels of a group, and how its output enters the residual stream, if known.

    beside: the other groups of its bundle, whose channels the module reads too (query heads of other KV groups).
    """

    path: str
    module: nn.Module
    group: CoupledGroup
    entry: ResidualEntry | None
    beside: tuple[CoupledGroup, ...] = ()


@torch.no_grad()
def restore(
    model: nn.Module,
    graph: ModelGraph,
    plan: StructurePlan,
    tokens: Tensor,
    settings: RestoreSettings,
    progress: Progress | None = None,
    processes: Processes | None = None,
    *,
    spill: Spill | None = None,
) -> Restoration:
    """Choose, refit and cut, block by block, in place.

    tokens: (sequences, length) ids of the refit text. Groups inside blocks that the plan drops, and groups of the
    whole model, are left for `cut`. Every consumer is refitted, in pruned and in whole blocks, to the dense module's
    output plus the gap between the dense and the pruned residual stream so far.
    processes: that run a part of the sequences each; the first one chooses and refits, from the moments of all. spill:
    where the activations of all sequences are kept, None for memory.
    """
    walker = BlockWalker(model, graph.blocks)
    new: NewTensors = list if spill is None else spill.empty
    streams = _start(walker, tokens, settings.micro_batch, new, processes or Processes())
    result = Restoration()
    for layer in range(len(graph.blocks)):
        if layer in plan.dropped_blocks:
            streams.dense = _run(walker, layer, streams.dense, streams)
            streams.apart = True
        else:
            _restore_block(walker, graph, plan, layer, streams, settings, result)
        if progress is not None:
            progress(layer + 1, len(graph.blocks))
    return result


def _start(walker: BlockWalker, tokens: Tensor, micro_batch: int, new: NewTensors, processes: Processes) -> _Streams:
    batches = torch.split(tokens, micro_batch)
    own = processes.share(len(batches))
    hidden, contexts = started(walker, batches[own.start : own.stop], new)
    one = walker.start(tokens[:1]).contexts
    return _Streams(processes, len(batches), new, one, contexts, hidden, hidden)


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
    ways = streams.processes.from_first(
        lambda: residual_ways(walker, layer, list(by_path), streams.dense[0][:1], streams.one)
    )
    consumers = []
    for way in ways:
        module, group = walker.model.get_submodule(way.path), by_path[way.path]
        entry = ResidualEntry.along(way, walker.model, weight_out_in(module)[:, 0])
        consumers.append(_Consumer(way.path, module, group, entry, _beside(group, groups)))
    return consumers


def _beside(group: CoupledGroup, groups: Sequence[CoupledGroup]) -> tuple[CoupledGroup, ...]:
    return tuple(one for one in groups if one.bundle and one.bundle == group.bundle and one != group)


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
    if whole and not streams.apart:
        streams.dense = streams.pruned = _run(walker, layer, streams.dense, streams)
        return
    streams.apart = True
    _bring(streams, walker.device(layer))
    consumers = _consumers(walker, graph, plan, layer, streams)
    dense_next, dense_outputs = _dense_pass(walker, layer, consumers, streams)
    _cut_stacked(walker.model, graph, plan, layer, result)
    pruned_next = _refit_consumers(walker, layer, consumers, streams, dense_outputs, plan, settings, result)
    for group in graph.in_block(layer):
        if group.name not in result.keep:
            result.keep[group.name] = plan.kept(group)
            cut_group(walker.model, group, plan.kept(group))
    if pruned_next is None:
        pruned_next = _run(walker, layer, streams.pruned, streams)
    streams.dense, streams.pruned = dense_next, pruned_next


def _bring(streams: _Streams, device: torch.device) -> None:
    """Have both streams on a device: that of the next block, where the model lies on several."""
    if any(one.device != device for one in streams.dense):
        both = streams.dense is streams.pruned
        streams.dense = held(streams.new, (one.to(device) for one in streams.dense))
        streams.pruned = streams.dense if both else held(streams.new, (one.to(device) for one in streams.pruned))


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


def _run(walker: BlockWalker, layer: int, hidden: Tensors, streams: _Streams) -> Tensors:
    return passed(walker, layer, hidden, streams.contexts, streams.new)


def _dense_pass(
    walker: BlockWalker, layer: int, consumers: Sequence[_Consumer], streams: _Streams
) -> tuple[Tensors, dict[str, Tensors]]:
    """The dense block's output, and what each of its consumers puts out."""
    paths = [consumer.path for consumer in consumers]
    outputs = {path: streams.new() for path in paths}
    dense_next = streams.new()
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
    dense_outputs: dict[str, Tensors],
    plan: StructurePlan,
    settings: RestoreSettings,
    result: Restoration,
) -> Tensors | None:
    """Refit one consumer after the other. Returns the block's new output where it follows without another run."""
    new = streams.new
    gap = held(new, (dense - pruned for dense, pruned in zip(streams.dense, streams.pruned, strict=True)))
    pruned_next: Tensors | None = None
    for position, consumer in enumerate(consumers):
        last = position == len(consumers) - 1
        taken = _pruned_pass(walker, layer, consumer.path, streams, to_the_end=last)
        dense, entry = dense_outputs.pop(consumer.path), consumer.entry
        aim = entry if settings.residual_target else None
        targets = held(new, (one if aim is None else aim.target(one, g) for one, g in zip(dense, gap, strict=True)))
        weights = [None if entry is None else entry.token_weights(one) for one in dense]
        wanted = _Wanted(targets, weights)
        fresh = held(new, _refit(walker.model, consumer, streams, taken.inputs, wanted, plan, settings, result))
        if entry is None:
            continue
        four = zip(gap, dense, targets, fresh, strict=True)
        gap = held(new, (_still_open(entry, *one) for one in four))
        if taken.block is not None:
            three = zip(taken.block, fresh, taken.outputs, strict=True)
            pruned_next = held(new, (out + entry.added(now) - entry.added(old) for out, now, old in three))
    return pruned_next


def _still_open(entry: ResidualEntry, gap: Tensor, dense: Tensor, target: Tensor, now: Tensor) -> Tensor:
    """What the residual stream lacks once the module puts out `now`."""
    if entry.norm is None:
        return entry.added(target - now)
    return gap + entry.added(dense) - entry.added(now)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a consumer should put out, and how much each token's error weighs (..., 1), None for all the same."""

    targets: Tensors
    weights: Sequence[Tensor | None]


@dataclass(frozen=True, slots=True)
class _Taken:
    """What a consumer reads and puts out in the pruned stream, and what the block does, None if it was left early."""

    inputs: Tensors
    outputs: Tensors
    block: Tensors | None


def _pruned_pass(walker: BlockWalker, layer: int, path: str, streams: _Streams, *, to_the_end: bool) -> _Taken:
    taken = _Taken(streams.new(), streams.new(), streams.new() if to_the_end else None)
    for hidden, context in zip(streams.pruned, streams.contexts, strict=True):
        with capture(walker.model, [path], stop=not to_the_end) as seen:
            out = walker.run_block(layer, hidden, context)
            if taken.block is not None:
                taken.block.append(out)
        taken.inputs.append(seen[path].input)
        if to_the_end:
            taken.outputs.append(seen[path].output)
    return taken


def _refit(
    model: nn.Module,
    consumer: _Consumer,
    streams: _Streams,
    taken: Tensors,
    wanted: _Wanted,
    plan: StructurePlan,
    settings: RestoreSettings,
    result: Restoration,
) -> Iterator[Tensor]:
    """Choose the group's units, cut it, refit the consumer. Returns the consumer's new outputs, batch by batch.

    taken: its inputs.
    """
    weight = weight_out_in(consumer.module).float().clone()
    bias = consumer.module._parameters.get("bias")
    extra = 0 if bias is None else 1
    fit, judging = _moments(weight, extra, streams, taken, wanted, settings.held_share)
    kept = streams.processes.from_first(lambda: _choose(consumer, weight, fit, judging, plan, settings))
    columns = _kept_columns(consumer, kept, plan, weight.shape[1], weight.device)
    if consumer.beside:
        cut_bundle(model, [consumer.group, *consumer.beside], plan)
    elif kept != tuple(range(consumer.group.units)):
        cut_group(model, consumer.group, kept)
    result.keep |= {consumer.group.name: kept, **{one.name: plan.kept(one) for one in consumer.beside}}
    if not kept:  # nothing is left to refit: the module gives its bias
        gone = weight.new_zeros(weight.shape[0], 0)
        return (nn.functional.linear(read[..., :0], gone.to(read.dtype), bias) for read in taken)
    with_bias = torch.cat([columns, torch.arange(extra, device=columns.device) + weight.shape[1]])
    start = torch.cat([weight, *([] if bias is None else [bias.float().unsqueeze(1)])], dim=1)[:, with_bias]
    fit = fit.select(with_bias)  # one after the other: both are large
    judging = judging.select(with_bias)
    new, error = start, 0.0
    if streams.processes.first:
        new, error = ridge_refit(start, fit, judging, settings.ridges)
    new = streams.processes.of_first(new)
    result.errors[consumer.path] = streams.processes.from_first(lambda: error)
    weight_out_in(consumer.module).copy_(new[:, : len(columns)])
    if bias is not None:
        bias.copy_(new[:, -1])
    mark_changed(model, consumer.path)
    return (nn.functional.linear(read[..., columns], new[:, : len(columns)].to(read.dtype), bias) for read in taken)


def _moments(
    weight: Tensor, extra: int, streams: _Streams, taken: Tensors, wanted: _Wanted, held_share: float
) -> tuple[Moments, Moments]:
    """Moments of the sequences to fit, and of those that only judge, over all processes."""
    held_from = streams.batches - max(1, round(streams.batches * held_share))
    fit, judging = (Moments.empty(weight.shape[1] + extra, weight.shape[0], weight.device) for _ in range(2))
    own = streams.processes.share(streams.batches)
    for index, read, target, weights in zip(own, taken, wanted.targets, wanted.weights, strict=True):
        x, t = _with_ones(read.flatten(0, -2).float(), extra), target.flatten(0, -2).float()
        if weights is not None:
            x, t = x * weights.flatten(0, -2), t * weights.flatten(0, -2)
        moments = fit if index < held_from else judging
        moments.add(x, t)
    return _summed(fit, streams.processes), _summed(judging, streams.processes)


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
    return tuple(group.others(gone.tolist()))
