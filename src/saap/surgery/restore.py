"""Cut and restore in one walk over the blocks.

Each block is finished before the next: its units are chosen, its consumers are refitted so that the residual stream
comes back to the dense one, and its members are cut. So one copy of the weights is enough: a block is still dense
when the dense stream passes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saap.core.records import CoupledGroup, ModelGraph, Role, StructurePlan
from saap.models.loading.precision import at_least_float32
from saap.models.structure.keep_index import require_possible
from saap.models.structure.linear import weight_out_in
from saap.models.walk.capture import capture
from saap.models.walk.layerwise import passed, started
from saap.models.walk.processes import Processes
from saap.models.walk.residual import ResidualEntry, residual_ways
from saap.models.walk.spill import HostSpill, NewTensors, Spill, Tensors, held
from saap.models.walk.walker import BlockWalker, Contexts
from saap.surgery.cut import cut_groups
from saap.surgery.refit import Consumer, Restoration, RestoreSettings, Wanted, refit, require_sequences

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class _Streams:
    """Hidden states before the current block, in the dense and in the pruned model, of this process' micro-batches.

    exact: walks without rounding, for trials. one: contexts of a batch of one sequence, for them too. sequences: of
    all processes. new: makes a sequence of tensors, one for each batch. apart: whether the two models differ.
    """

    processes: Processes
    sequences: int
    new: NewTensors
    exact: BlockWalker
    one: Contexts
    contexts: list[Contexts]
    dense: Tensors
    pruned: Tensors
    apart: bool = False


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
    spill: Spill | HostSpill | None = None,
) -> Restoration:
    """Choose, refit and cut, block by block, in place.

    tokens: (sequences, length) ids of the refit text. Groups inside blocks that the plan drops, and groups of the
    whole model, are left for `cut`. Every consumer is refitted, in pruned and in whole blocks, to the dense module's
    output plus the gap between the dense and the pruned residual stream so far.
    processes: that run a part of the sequences each; the first one chooses and refits, from the moments of all. spill:
    where the activations of all sequences are kept, None for the memory of the model.
    Raises CalibrationError for a single sequence, PlanError for a plan that the model cannot follow.
    """
    require_sequences(len(tokens))
    require_possible(graph, plan.keep, plan.dropped_blocks)
    walker = BlockWalker(model, graph.blocks, products=settings.products)
    new: NewTensors = list if spill is None else spill.empty
    streams = _start(BlockWalker(model, graph.blocks), tokens, settings.micro_batch, new, processes or Processes())
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
    return _Streams(processes, len(tokens), new, walker, one, contexts, hidden, hidden)


def _consumers(
    walker: BlockWalker, graph: ModelGraph, plan: StructurePlan, layer: int, streams: _Streams
) -> list[Consumer]:
    """The block's consumers in the order in which they run."""
    # Query heads lie in the same channels as their KV groups: of the two, those that lose something.
    groups = [
        group for group in graph.in_block(layer) if group.role is not Role.QUERY or len(plan.kept(group)) < group.units
    ]
    by_path = {
        member.tensor.rpartition(".")[0]: group for group in groups for member in group.consumers if member.part is None
    }
    ways = streams.processes.from_first(
        lambda: residual_ways(streams.exact, layer, list(by_path), streams.dense[0][:1], streams.one)
    )
    consumers = []
    for way in ways:
        module, group = walker.model.get_submodule(way.path), by_path[way.path]
        entry = ResidualEntry.along(way, walker.model, weight_out_in(module)[:, 0])
        consumers.append(Consumer(way.path, module, group, entry, _beside(group, groups)))
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
            cut_groups(walker.model, [group], plan.keep)
    if pruned_next is None:
        pruned_next = _run(walker, layer, streams.pruned, streams)
    streams.dense, streams.pruned = dense_next, pruned_next


def _bring(streams: _Streams, device: torch.device) -> None:
    """Have both streams on a device: that of the next block, where the model lies on several."""
    both = streams.dense is streams.pruned
    streams.dense = _moved(streams, streams.dense, device)
    streams.pruned = streams.dense if both else _moved(streams, streams.pruned, device)


def _moved(streams: _Streams, hidden: Tensors, device: torch.device) -> Tensors:
    """Hidden states of all batches, which lie together, on a device."""
    if not len(hidden) or hidden[0].device == device:
        return hidden
    return held(streams.new, (one.to(device) for one in hidden))


def _cut_stacked(model: nn.Module, graph: ModelGraph, plan: StructurePlan, layer: int, result: Restoration) -> None:
    """Cut stacked matrices (experts), which are not refitted, before what is refitted makes up for them."""
    bundles: dict[str, list[CoupledGroup]] = {}
    for group in graph.in_block(layer):
        if group.bundle and group.role is not Role.QUERY:
            bundles.setdefault(group.bundle, []).append(group)
    for groups in bundles.values():
        result.keep |= {group.name: plan.kept(group) for group in groups}
        cut_groups(model, groups, plan.keep)
    for group in graph.in_block(layer):
        if group.role is Role.EXPERT:
            result.keep[group.name] = plan.kept(group)
            cut_groups(model, [group], plan.keep)


def _run(walker: BlockWalker, layer: int, hidden: Tensors, streams: _Streams) -> Tensors:
    return passed(walker, layer, hidden, streams.contexts, streams.new)


def _dense_pass(
    walker: BlockWalker, layer: int, consumers: Sequence[Consumer], streams: _Streams
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
    consumers: Sequence[Consumer],
    streams: _Streams,
    dense_outputs: dict[str, Tensors],
    plan: StructurePlan,
    settings: RestoreSettings,
    result: Restoration,
) -> Tensors | None:
    """Refit one consumer after the other. Returns the block's new output where it follows without another run.

    What the pruned stream lacks, and all that is compared with it, is of float32 at least: in the bfloat16 of a model
    it would be lost in rounding.
    """
    new = streams.new
    both = zip(streams.dense, streams.pruned, strict=True)
    gap = held(new, (at_least_float32(dense) - at_least_float32(pruned) for dense, pruned in both))
    pruned_next: Tensors | None = None
    for position, consumer in enumerate(consumers):
        last = position == len(consumers) - 1
        taken = _pruned_pass(walker, layer, consumer.path, streams, to_the_end=last)
        dense, entry = dense_outputs.pop(consumer.path), consumer.entry
        aim = entry if settings.residual_target else None
        targets = held(new, (one if aim is None else aim.target(one, g) for one, g in zip(dense, gap, strict=True)))
        wanted = Wanted(targets, _token_weights(entry, dense))
        fresh = held(
            new,
            refit(
                walker.model,
                consumer,
                streams.processes,
                streams.sequences,
                taken.inputs,
                wanted,
                plan,
                settings,
                result,
            ),
        )
        if entry is None:
            continue
        gap = held(new, _still_open(entry, gap, dense, targets, fresh))
        if taken.block is not None:
            changes = zip(taken.block, fresh, taken.outputs, strict=True)
            pruned_next = held(new, (_exchanged(entry, *change) for change in changes))
    return pruned_next


def _exchanged(entry: ResidualEntry, out: Tensor, now: Tensor, old: Tensor) -> Tensor:
    """A block's output once a module puts out `now` in place of `old`."""
    return (out + entry.added(now) - entry.added(at_least_float32(old))).to(out.dtype)


def _token_weights(entry: ResidualEntry | None, dense: Tensors) -> list[Tensor] | None:
    """How much each token's error weighs, batch by batch, given the dense outputs; None for all the same."""
    if entry is None or entry.norm is None:
        return None
    return [entry.token_weights(one) for one in dense]


def _still_open(
    entry: ResidualEntry, gap: Tensors, dense: Tensors, targets: Tensors, fresh: Tensors
) -> Iterator[Tensor]:
    """What the residual stream lacks once the module puts out `fresh` where the dense one puts out `dense`."""
    if entry.norm is None:
        return (entry.added(target - now) for target, now in zip(targets, fresh, strict=True))
    batches = zip(gap, dense, fresh, strict=True)
    return (lacking + entry.added(at_least_float32(one)) - entry.added(now) for lacking, one, now in batches)


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
