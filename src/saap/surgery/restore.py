"""Cut and compensate by least squares in one walk over the blocks.

Each block is finished before the next: its units are chosen, its consumers are fitted again so that the residual stream
comes back to the dense one, and its members are cut. So one copy of the weights is enough: a block is still dense
when the dense stream passes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saap.core.records import CoupledGroup, Role, StructurePlan
from saap.models.loading.precision import at_least_float32
from saap.models.structure.keep_index import require_possible
from saap.models.structure.linear import weight_out_in
from saap.models.walk.backend import Backend
from saap.models.walk.capture import capture
from saap.models.walk.residual import ResidualEntry, residual_paths
from saap.models.walk.spill import Tensors
from saap.models.walk.walk import embed, run_block
from saap.surgery.cut import cut_groups
from saap.surgery.refit import (
    Consumer,
    ReconstructionTarget,
    Refit,
    Restoration,
    RestoreSettings,
    require_sequences,
)


@torch.no_grad()
def restore(backend: Backend, plan: StructurePlan, tokens: Tensor, settings: RestoreSettings) -> Restoration:
    """Choose, fit and cut, block by block, in place: the least-squares reconstruction.

    tokens: (sequences, length) ids of its text. Groups inside blocks that the plan drops, and groups of the whole
    model, are left for `cut`. Every consumer is fitted again, in pruned and in whole blocks, to the dense module's
    output plus the gap between the dense and the pruned residual stream so far.
    Of the processes of the backend each runs a part of the sequences; the first one chooses and fits, from the moments
    of all. Its products count for forward passes; moments and solutions are of float32 and more.
    Raises CalibrationError for a single sequence, PlanError for a plan that the model cannot follow.
    """
    require_sequences(len(tokens))
    require_possible(backend.graph, plan.keep, plan.dropped_blocks)
    walk = _Reconstruction(backend, plan, tokens, settings)
    for layer in range(len(backend.graph.blocks)):
        walk.pass_block(layer)
        backend.progress(layer + 1, len(backend.graph.blocks))
    return walk.refit.result


@dataclass(frozen=True, slots=True)
class CapturedActivations:
    """What a consumer reads and gives in the pruned stream, and what the block gives, None if it was left early."""

    inputs: Tensors
    outputs: Tensors
    block: Tensors | None


class _Reconstruction:
    """The hidden states before the current block, in the dense and in the pruned model, of this process' micro-batches.

    exact: walks without rounding, for trials. one: contexts of a batch of one sequence, for them too. apart: whether
    the two models differ so far.
    """

    def __init__(self, backend: Backend, plan: StructurePlan, tokens: Tensor, settings: RestoreSettings) -> None:
        self.model, self.graph, self.plan, self.settings = backend.model, backend.graph, plan, settings
        self.processes, self.keep, self.walker = backend.processes, backend.keep, backend.walker()
        self.exact = dataclasses.replace(backend, products=None).walker()
        self.refit = Refit(backend, plan, settings, len(tokens))
        batches = torch.split(tokens, settings.micro_batch)
        own = self.processes.share(len(batches))
        self.dense, self.contexts = embed(self.exact, batches[own.start : own.stop], self.keep)
        self.pruned = self.dense
        self.one = self.exact.start(tokens[:1]).contexts
        self.apart = False

    def pass_block(self, layer: int) -> None:
        """Finish one block."""
        groups = self.graph.in_block(layer)
        if layer in self.plan.dropped_blocks:
            self.dense, self.apart = self._run(layer, self.dense), True
        elif self.apart or any(len(self.plan.kept(group)) < group.units for group in groups):
            self.apart = True
            self._reconstruct(layer, groups)
        else:
            self.dense = self.pruned = self._run(layer, self.dense)

    def _run(self, layer: int, hidden: Tensors) -> Tensors:
        return run_block(self.walker, layer, hidden, self.contexts, self.keep)

    def _reconstruct(self, layer: int, groups: Sequence[CoupledGroup]) -> None:
        self._move(self.walker.device(layer))
        consumers = self._consumers(layer, groups)
        dense_next, dense_outputs = self._dense_pass(layer, [consumer.path for consumer in consumers])
        self._cut_stacked(groups)
        pruned_next = self._refit_consumers(layer, consumers, dense_outputs)
        for group in groups:
            if group.name not in self.refit.result.keep:
                self._cut(group)
        if pruned_next is None:
            pruned_next = self._run(layer, self.pruned)
        self.dense, self.pruned = dense_next, pruned_next

    def _cut(self, group: CoupledGroup) -> None:
        self.refit.result.keep[group.name] = self.plan.kept(group)
        cut_groups(self.model, [group], self.plan.keep)

    def _move(self, device: torch.device) -> None:
        """Have both streams on a device: that of the next block, where the model lies on several."""
        both = self.dense is self.pruned
        self.dense = self._moved(self.dense, device)
        self.pruned = self.dense if both else self._moved(self.pruned, device)

    def _moved(self, hidden: Tensors, device: torch.device) -> Tensors:
        """Hidden states of all batches, which lie together, on a device."""
        if not len(hidden) or hidden[0].device == device:
            return hidden
        return self.keep(one.to(device) for one in hidden)

    def _consumers(self, layer: int, groups: Sequence[CoupledGroup]) -> list[Consumer]:
        """The block's consumers in the order in which they run."""
        # Query heads lie in the same channels as their KV groups: of the two, those that lose something.
        groups = [one for one in groups if one.role is not Role.QUERY or len(self.plan.kept(one)) < one.units]
        members = [(member, group) for group in groups for member in group.consumers if member.part is None]
        by_path = {member.tensor.rpartition(".")[0]: group for member, group in members}
        found = self.processes.broadcast_result(
            lambda: residual_paths(self.exact, layer, list(by_path), self.dense[0][:1], self.one)
        )
        consumers = []
        for one in found:
            module, group = self.model.get_submodule(one.module), by_path[one.module]
            entry = ResidualEntry.along(one, self.model, weight_out_in(module)[:, 0])
            bundle = [other for other in groups if other.bundle and other.bundle == group.bundle and other != group]
            consumers.append(Consumer(one.module, module, group, entry, tuple(bundle)))
        return consumers

    def _dense_pass(self, layer: int, paths: Sequence[str]) -> tuple[Tensors, dict[str, Tensors]]:
        """The dense block's output, and what each of its consumers gives."""
        outputs = {path: self.keep(()) for path in paths}
        after = self.keep(())
        for hidden, context in zip(self.dense, self.contexts, strict=True):
            with capture(self.model, paths) as seen:
                after.append(self.walker.run_block(layer, hidden, context))
            for path, one in seen.items():
                outputs[path].append(one.output)
        return after, outputs

    def _cut_stacked(self, groups: Sequence[CoupledGroup]) -> None:
        """Cut stacked matrices (experts), which are not fitted again, before what is fitted compensates for them."""
        bundles: dict[str, list[CoupledGroup]] = {}
        for group in groups:
            if group.bundle and group.role is not Role.QUERY:
                bundles.setdefault(group.bundle, []).append(group)
        for bundle in bundles.values():
            self.refit.result.keep |= {group.name: self.plan.kept(group) for group in bundle}
            cut_groups(self.model, bundle, self.plan.keep)
        for group in groups:
            if group.role is Role.EXPERT:
                self._cut(group)

    def _refit_consumers(
        self, layer: int, consumers: Sequence[Consumer], dense_outputs: dict[str, Tensors]
    ) -> Tensors | None:
        """Fit one consumer after the other. Returns the block's new output where it follows without another run.

        What the pruned stream lacks, and all that is compared with it, is of float32 at least: in the bfloat16 of a
        model it would be lost in rounding.
        """
        both = zip(self.dense, self.pruned, strict=True)
        gap = self.keep(at_least_float32(dense) - at_least_float32(pruned) for dense, pruned in both)
        pruned_next: Tensors | None = None
        for position, consumer in enumerate(consumers):
            last = position == len(consumers) - 1
            taken = self._pruned_pass(layer, consumer.path, to_the_end=last)
            dense, entry = dense_outputs.pop(consumer.path), consumer.entry
            outputs = self.keep(_targets(entry if self.settings.residual_target else None, dense, gap))
            target = ReconstructionTarget(outputs, _token_weights(entry, dense))
            fresh = self.keep(self.refit.fit(consumer, taken.inputs, target))
            if entry is None:
                continue
            gap = self.keep(_residual_error(entry, gap, dense, outputs, fresh))
            if taken.block is not None:
                changes = zip(taken.block, fresh, taken.outputs, strict=True)
                pruned_next = self.keep(_exchanged(entry, *change) for change in changes)
        return pruned_next

    def _pruned_pass(self, layer: int, path: str, *, to_the_end: bool) -> CapturedActivations:
        inputs, outputs, block = (self.keep(()) for _ in range(3))
        for hidden, context in zip(self.pruned, self.contexts, strict=True):
            with capture(self.model, [path], stop=not to_the_end) as seen:
                block.append(self.walker.run_block(layer, hidden, context))
            inputs.append(seen[path].input)
            if to_the_end:
                outputs.append(seen[path].output)
        return CapturedActivations(inputs, outputs, block if to_the_end else None)


def _targets(entry: ResidualEntry | None, dense: Tensors, gap: Tensors) -> Iterator[Tensor]:
    """What a consumer should give, batch by batch; without an entry what the dense one gives."""
    for one, lacking in zip(dense, gap, strict=True):
        yield one if entry is None else entry.target(one, lacking)


def _exchanged(entry: ResidualEntry, out: Tensor, now: Tensor, old: Tensor) -> Tensor:
    """A block's output once a module gives `now` in place of `old`."""
    return (out + entry.added(now) - entry.added(at_least_float32(old))).to(out.dtype)


def _token_weights(entry: ResidualEntry | None, dense: Tensors) -> list[Tensor] | None:
    """How much each token's error weighs, batch by batch, given the dense outputs; None for all the same."""
    if entry is None or entry.norm is None:
        return None
    return [entry.token_weights(one) for one in dense]


def _residual_error(
    entry: ResidualEntry, gap: Tensors, dense: Tensors, targets: Tensors, fresh: Tensors
) -> Iterator[Tensor]:
    """What the residual stream lacks once the module gives `fresh` where the dense one gives `dense`."""
    if entry.norm is None:
        return (entry.added(target - now) for target, now in zip(targets, fresh, strict=True))
    batches = zip(gap, dense, fresh, strict=True)
    return (lacking + entry.added(at_least_float32(one)) - entry.added(now) for lacking, one, now in batches)
