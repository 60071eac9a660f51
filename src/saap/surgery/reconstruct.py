"""Least-squares reconstruction: cut and compensate in one walk over the blocks.

Each block is finished before the next: its units are chosen, its consumers are fitted again so that the residual stream
comes back to the dense one, and its members are cut. So one copy of the weights is enough: a block is still dense
when the dense stream passes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from saap.core.records import CoupledGroup, FloatArray, Role, StructurePlan
from saap.models.loading.precision import at_least_float32
from saap.models.structure.cut import cut_bundles, cut_groups
from saap.models.structure.keep_index import KeepIndex, require_possible, unit_channels
from saap.models.structure.least_squares import Moments, removal_order, ridge_fit
from saap.models.structure.linear import contracted_axis, weight_out_in
from saap.models.structure.routing import never_chosen
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Capture, capture
from saap.models.walk.offload import onload
from saap.models.walk.residual import ResidualPath, residual_paths
from saap.models.walk.spill import PackedTensors, Tensors, drained
from saap.models.walk.walk import embed, run_block
from saap.models.walk.walker import Contexts
from saap.surgery.finished import ReconstructionRecord
from saap.surgery.held_out import MICRO_BATCH, require_sequences, rows_to_fit_on
from saap.surgery.merging import merge_experts, merged_stacks
from saap.surgery.stacked import GramMatrices, fit_columns, one_by_one, stacks_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionSettings:
    """How the reconstruction works.

    second_order: choose units by the pruned stream's Gram matrix at the plan's counts instead of taking the plan's own
    units. scores: by group, the importance of its units (units,), which that choice weighs in as well. residual_target:
    aim at the dense residual stream, the error so far included; False aims at the dense module's output alone, to
    measure the difference; tokens weigh the same in both. merge: fit kept experts to what removed ones added.
    """

    second_order: bool = True
    scores: Mapping[str, FloatArray] | None = None
    residual_target: bool = True
    merge: bool = False


@dataclass(slots=True)
class Reconstruction:
    """What was done. keep: the final kept units by group. errors: held-out error of each matrix relative to before.

    That of merged experts is under the path of their module: channels removed from their matrices have one as well.
    dense: hidden states after the dense model's last block, in micro-batches of this process' part of `others`.
    """

    keep: dict[str, tuple[int, ...]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    dense: Tensors = field(default_factory=PackedTensors)


@torch.no_grad()
def reconstruct(
    backend: Backend,
    plan: StructurePlan,
    tokens: Tensor,
    settings: ReconstructionSettings,
    others: Tensor | None = None,
    digest: str = "",
) -> Reconstruction:
    """Choose, fit and cut, block by block, in place.

    tokens: (sequences, length) ids of its text. Groups inside blocks that the plan drops, and groups of the whole
    model, are left for `cut`. Every consumer is fitted again, in pruned and in whole blocks, to the dense module's
    output plus the error of the pruned residual stream so far.
    others: (sequences, length) ids of further text, of which only the dense model's hidden states are wanted.
    Of the processes of the backend each runs a part of the sequences; the first one chooses and fits, from the moments
    of all. Its products count for forward passes; moments and solutions are of float32 and more.
    digest: of all that decides the result. With it, each finished block is recorded if weights are in files and the
    spill resumes. An interrupted reconstruction then resumes after the last one.
    Raises CalibrationError for a single sequence, PlanError for a plan that the model cannot follow, StaleInputError.
    """
    require_sequences(len(tokens))
    require_possible(backend.graph, plan.keep, plan.dropped_blocks)
    walk = _BlockByBlock(backend, plan, tokens, settings, tokens[:0] if others is None else others)
    record = ReconstructionRecord.of(backend, digest)
    for layer in range(walk.resume(record), len(backend.graph.blocks)):
        walk.run_block(layer)
        if record is not None:
            streams = [walk.others, walk.dense, *([] if walk.pruned is walk.dense else [walk.pruned])]
            record.write(layer + 1, streams, walk.result.keep, walk.result.errors)
        backend.progress(layer + 1, len(backend.graph.blocks))
    walk.result.dense = walk.others
    return walk.result


@dataclass(frozen=True, slots=True)
class _Consumer:
    """A linear module that reads the channels of a group, and how its output enters the residual stream, if known.

    bundle: the other groups of the group's bundle, whose channels it reads too (query heads of other KV groups).
    """

    path: str
    module: nn.Module
    group: CoupledGroup
    residual: ResidualPath | None
    bundle: tuple[CoupledGroup, ...]


class _BlockByBlock:
    """The hidden states before the current block, in the dense and in the pruned model, of this process' micro-batches.

    They are one object as long as the models are the same. exact: walks without rounding, for trials. one: contexts of
    a batch of one sequence, for them too. sequences: of all processes.
    """

    def __init__(
        self, backend: Backend, plan: StructurePlan, tokens: Tensor, settings: ReconstructionSettings, others: Tensor
    ) -> None:
        self.model, self.graph, self.plan, self.settings = backend.model, backend.graph, plan, settings
        self.processes, self.keep, self.walker = backend.processes, backend.keep, backend.walker()
        self.exact = dataclasses.replace(backend, products=None).walker()
        self.sequences, self.result = len(tokens), Reconstruction()
        self.dense, self.contexts = self._embedded(tokens)
        self.others, self.contexts_of_others = self._embedded(others)
        self.pruned = self.dense
        self.one = self.exact.start(tokens[:1]).contexts
        self.dtype = self.dense[0].dtype if len(self.dense) else torch.float32

    def _embedded(self, tokens: Tensor) -> tuple[Tensors, list[Contexts]]:
        """Hidden states before the first block, and contexts, of this process' micro-batches."""
        batches = torch.split(tokens, MICRO_BATCH) if len(tokens) else ()
        own = self.processes.share(len(batches))
        return embed(self.exact, batches[own.start : own.stop], self.keep)

    def _own(self) -> range:
        """Indices of this process' micro-batches."""
        return self.processes.share(-(-self.sequences // MICRO_BATCH))

    def resume(self, record: ReconstructionRecord | None) -> int:
        """The number of blocks that an interrupted run has finished, after which this one resumes."""
        found = None if record is None else record.read()
        if found is None:
            return 0
        self.result.keep, self.result.errors = found.keep, found.errors
        self.others, self.dense, *own = found.streams
        self.pruned = own[0] if own else self.dense
        return found.blocks

    def run_block(self, layer: int) -> None:
        """Finish one block."""
        groups = self.graph.in_block(layer)
        device = next(self.walker.blocks[layer].parameters()).device
        others = self._moved(self.others, device)
        self.others = run_block(self.walker, layer, others, self.contexts_of_others, self.keep)
        if layer in self.plan.dropped_blocks:
            self.dense = self._passed(layer, self.dense)
        elif self.dense is not self.pruned or any(len(self.plan.kept(group)) < group.units for group in groups):
            self._reconstruct(layer, groups, device)
        else:
            self.dense = self._passed(layer, self.dense)
            self.pruned = self.dense

    def _passed(self, layer: int, hidden: Tensors) -> Tensors:
        """The block's output for the hidden states of the text to fit on."""
        return run_block(self.walker, layer, hidden, self.contexts, self.keep)

    def _reconstruct(self, layer: int, groups: Sequence[CoupledGroup], device: torch.device) -> None:
        same = self.dense is self.pruned
        self.dense = self._moved(self.dense, device)
        self.pruned = self.dense if same else self._moved(self.pruned, device)
        consumers = self._consumers(layer, groups)
        merged = merged_stacks(groups, self.plan.keep) if self.settings.merge else {}
        sites = [*(one.path for one in consumers), *merged]
        dense_next, dense_outputs = self._captured(layer, self.dense, sites, "output")
        both = zip(self.dense if same else drained(self.dense), self.pruned, strict=True)
        errors = self.keep(at_least_float32(dense) - at_least_float32(pruned) for dense, pruned in both)
        self.dense = dense_next  # what came in is not needed any more
        self._fit_stacks(layer, groups)
        # Unless they are merged, whole experts are not fitted again: what is fitted compensates for them.
        early = [one for one in groups if one.role is Role.EXPERT or (one.bundle and one.role is not Role.QUERY)]
        self._cut([one for one in early if one.name not in self.result.keep])
        for site, stack in merged.items():
            calls, dense = self._expert_calls(layer, site), dense_outputs.pop(site)
            error = merge_experts(self.model, stack, calls, drained(dense), self.keep, self.processes)
            self.result.errors[site] = error
        pruned_next = self._fit_consumers(layer, consumers, dense_outputs, errors)
        self._cut([group for group in groups if group.name not in self.result.keep])
        if pruned_next is None:
            pruned_next = self._passed(layer, self.pruned)
        self.pruned = pruned_next

    def _fit_stacks(self, layer: int, groups: Sequence[CoupledGroup]) -> None:
        """Choose the units of stacked matrices (experts), fit these to their own dense output, and cut.

        Every expert sees the tokens that the pruned stream routes to it, after whole experts have left.
        """
        losing = [group for group in groups if len(self.plan.kept(group)) < group.units]
        stacks, processes = stacks_of(losing), self.processes
        grams, without = GramMatrices(self.model, stacks), [group for group in losing if group.role is Role.EXPERT]
        own = self._own() if stacks else ()
        for index, hidden, context in zip(own, self.pruned, self.contexts, strict=bool(stacks)):
            # Experts see tokens without their sequences: a micro-batch of both kinds is fitted as a whole.
            observed = grams.observed(held_out=rows_to_fit_on(self.sequences, index, len(hidden)) == 0)
            with one_by_one(self.model), never_chosen(self.model, without, self.plan.keep), observed:
                self.exact.run_block(layer, hidden, context)
        for stack in stacks:
            onload(self.model, stack.tensor, change=True)
            parameter, errors = self.model.get_parameter(stack.tensor), []
            for place, group in enumerate(stack.groups):
                weight = stack.matrix(parameter, place)
                plain = weight.float().clone()
                fit, held_out = (grams.moments(stack, place, plain, processes, held_out=one) for one in (False, True))
                kept = processes.broadcast_result(partial(self._by_second_order, group, plain, fit, held_out))
                columns = torch.from_numpy(group.consumers[0].indices(kept)).to(weight.device)
                new, error = fit_columns(plain, columns, fit, held_out) if processes.first else (plain[:, columns], 1.0)
                weight.index_copy_(1, columns, processes.broadcast(new).to(weight))
                errors.append(processes.broadcast_result(partial(float, error)))
                self.result.keep[group.name] = kept
            self.result.errors[stack.tensor] = sum(errors) / len(errors)
            cut_groups(self.model, stack.groups, self.result.keep)

    def _expert_calls(self, layer: int, site: str) -> Iterator[tuple[Capture, int]]:
        """Calls of the experts that are left, by the pruned stream, and how many of the tokens of each are fitted."""
        for index, hidden, context in zip(self._own(), self.pruned, self.contexts, strict=True):
            with capture(self.model, [site], stop=True) as seen:
                self.walker.run_block(layer, hidden, context)
            yield seen[site], rows_to_fit_on(self.sequences, index, hidden.shape[:2].numel())

    def _moved(self, hidden: Tensors, device: torch.device) -> Tensors:
        """Hidden states of all batches, which lie together, on a device: that of the next block."""
        if not len(hidden) or hidden[0].device == device:
            return hidden
        return self.keep(one.to(device) for one in hidden)

    def _cut(self, groups: Sequence[CoupledGroup]) -> None:
        """Cut groups to the plan's own units."""
        self.result.keep |= {group.name: self.plan.kept(group) for group in groups}
        cut_bundles(self.model, groups, self.plan.keep)

    def _consumers(self, layer: int, groups: Sequence[CoupledGroup]) -> list[_Consumer]:
        """The block's consumers in the order in which they run."""
        # Query heads lie in the same channels as their KV groups: of the two, those that lose something.
        groups = [one for one in groups if one.role is not Role.QUERY or len(self.plan.kept(one)) < one.units]
        members = [(member, group) for group in groups for member in group.consumers if member.part is None]
        by_path = {member.tensor.rpartition(".")[0]: group for member, group in members}
        found = self.processes.broadcast_result(
            lambda: residual_paths(self.exact, layer, list(by_path), self.dense[0][:1], self.one)
        )
        consumers = []
        for path, residual in found.items():
            module, group = self.model.get_submodule(path), by_path[path]
            bundle = [other for other in groups if other.bundle and other.bundle == group.bundle and other != group]
            if residual is not None:
                residual = residual.loaded(self.model, weight_out_in(module)[:, 0])
            consumers.append(_Consumer(path, module, group, residual, tuple(bundle)))
        return consumers

    def _captured(
        self, layer: int, hidden: Tensors, paths: Sequence[str], signal: str, *, stop: bool = False
    ) -> tuple[Tensors, dict[str, Tensors]]:
        """The block's output, and `signal` ("input" or "output") of the modules at `paths`; stop: after the first."""
        after = self.keep(())
        found = {path: self.keep(()) for path in paths}
        for one, context in zip(hidden, self.contexts, strict=True):
            with capture(self.model, paths, stop=stop) as seen:
                after.append(self.walker.run_block(layer, one, context))
            for path, tensors in found.items():
                tensors.append(getattr(seen[path], signal))
        return after, found

    def _fit_consumers(
        self, layer: int, consumers: Sequence[_Consumer], dense_outputs: dict[str, Tensors], errors: Tensors
    ) -> Tensors | None:
        """Fit one consumer after the other. Returns the block's new output where it follows without another run.

        errors: of the pruned stream that enters the block. They, and all that is compared with them, are of float32 at
        least: in the bfloat16 of a model they would be lost in rounding. No sequence is kept longer than it is needed:
        together they are most of the memory.
        """
        for consumer in consumers:
            path, residual, last = consumer.path, consumer.residual, consumer is consumers[-1]
            dense = dense_outputs.pop(path)
            if residual is None or not last:
                inputs = self._captured(layer, self.pruned, [path], "input", stop=True)[1].pop(path)
            else:
                inputs, others = self._without_output(layer, path, residual)
            fresh = self._fit(consumer, inputs, dense, errors)
            if residual is None:
                continue
            if last:
                del dense, errors
                both = zip(drained(others), fresh, strict=True)
                return self.keep((rest + residual.added(new)).to(self.dtype) for rest, new in both)
            changes = zip(drained(errors), drained(dense), fresh, strict=True)
            errors = self.keep(
                error + residual.added(at_least_float32(old)) - residual.added(new) for error, old, new in changes
            )
        return None

    def _without_output(self, layer: int, path: str, residual: ResidualPath) -> tuple[Tensors, Tensors]:
        """What a module reads, and what the block gives without that module's output. The stream before is let go."""
        inputs, others = self.keep(()), self.keep(())
        hidden, self.pruned = self.pruned, self.keep(())
        for one, context in zip(drained(hidden), self.contexts, strict=True):
            with capture(self.model, [path]) as seen:
                after = self.walker.run_block(layer, one, context)
            inputs.append(seen[path].input)
            others.append(at_least_float32(after) - residual.added(at_least_float32(seen[path].output)))
        return inputs, others

    def _fit(self, consumer: _Consumer, inputs: Tensors, dense: Tensors, errors: Tensors) -> Iterator[Tensor]:
        """Choose the group's units, cut it, fit the consumer. Returns the consumer's new outputs, batch by batch.

        inputs, dense, errors: what the consumer reads, what it gives in the dense model, and by how much the pruned
        stream is off, in the micro-batches of this process.
        """
        processes, groups = self.processes, [consumer.group, *consumer.bundle]
        weight = weight_out_in(consumer.module).float().clone()
        bias = consumer.module._parameters.get("bias")
        fit, held_out = self._moments(consumer, weight, bias, zip(inputs, dense, errors, strict=True))
        kept = processes.broadcast_result(lambda: self._choose(consumer, weight, fit, held_out))
        keep = {one.name: self.plan.kept(one) for one in consumer.bundle} | {consumer.group.name: kept}
        axis = KeepIndex.of(self.graph, keep).axis(f"{consumer.path}.weight", contracted_axis(consumer.module) or 0)
        columns = torch.from_numpy(axis.kept()).to(weight.device)
        cut_groups(self.model, groups, keep)
        self.result.keep |= keep
        if not kept:  # nothing is left to fit: the module gives its bias
            nothing = weight.new_zeros(weight.shape[0], 0)
            return (_linear(x[..., :0], nothing, bias) for x in drained(inputs))
        whole = weight if bias is None else torch.cat([weight, bias.float().unsqueeze(1)], dim=1)
        chosen = torch.cat([columns, torch.arange(weight.shape[1], whole.shape[1], device=columns.device)])
        start = whole[:, chosen]
        fit = fit.select(chosen)  # one after the other: both are large
        held_out = held_out.select(chosen)
        new, error = ridge_fit(start, fit, held_out) if processes.first else (start, 0.0)
        new = processes.broadcast(new)
        self.result.errors[consumer.path] = processes.broadcast_result(lambda: error)
        onload(self.model, consumer.path, change=True)
        weight_out_in(consumer.module).copy_(new[:, : len(columns)])
        if bias is not None:
            bias.copy_(new[:, -1])
        return (_linear(x[..., columns], new[:, : len(columns)], bias) for x in drained(inputs))

    def _moments(
        self, consumer: _Consumer, weight: Tensor, bias: Tensor | None, batches: Iterable[tuple[Tensor, Tensor, Tensor]]
    ) -> tuple[Moments, Moments]:
        """Moments of the sequences to fit on, and of those that are held out, over all processes."""
        channels = weight.shape[1] + (0 if bias is None else 1)
        fit, held_out = (Moments.empty(channels, weight.shape[0], weight.device) for _ in range(2))
        own, residual = self._own(), consumer.residual
        for index, (read, dense, error) in zip(own, batches, strict=True):
            aims = residual is not None and self.settings.residual_target
            target = residual.target(dense, error) if residual is not None and aims else dense
            x, t = read.flatten(0, -2).float(), target.flatten(0, -2).float()
            if bias is not None:
                x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            if residual is not None and residual.norm is not None:  # behind a norm tokens weigh differently
                weights = residual.token_weights(dense).flatten(0, -2)
                x, t = x * weights, t * weights
            fitted = rows_to_fit_on(self.sequences, index, len(x))
            for moments, rows in ((fit, slice(fitted)), (held_out, slice(fitted, None))):
                if len(x[rows]):
                    moments.add(x[rows], t[rows])
        return fit.total(self.processes), held_out.total(self.processes)

    def _choose(self, consumer: _Consumer, weight: Tensor, fit: Moments, held_out: Moments) -> tuple[int, ...]:
        """The units that stay: the plan's own, or as many by second-order cost."""
        alone = not consumer.bundle and len({member.tensor for member in consumer.group.consumers}) == 1
        own = self.plan.kept(consumer.group)
        return self._by_second_order(consumer.group, weight, fit, held_out) if alone else own

    def _by_second_order(self, group: CoupledGroup, weight: Tensor, fit: Moments, held_out: Moments) -> tuple[int, ...]:
        """As many units of one consumer as the plan keeps. weight: (outputs, channels)."""
        kept, settings = self.plan.kept(group), self.settings
        removed = group.units - len(kept)
        if not (settings.second_order and removed and kept and fit.tokens + held_out.tokens):
            return kept
        units = torch.cat([unit_channels(member, group.units, weight.device) for member in group.consumers], dim=1)
        channels = weight.shape[1]
        gram = fit.gram[:channels, :channels] + held_out.gram[:channels, :channels]
        scores = None
        if settings.scores is not None:
            values = torch.as_tensor(settings.scores[group.name])
            scores = (values / values.mean().clamp_min(1e-30)).to(weight)
        at_once = 32 if units.shape[1] == 1 else 1
        order, _ = removal_order(weight, gram, units, removed, at_once=at_once, scores=scores)
        return tuple(group.others(order.tolist()))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear module with these weights gives, in at least float32: differences are taken of it."""
    x = at_least_float32(x)
    return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
