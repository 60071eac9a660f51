"""Where the members of the coupled groups are watched while a block runs backward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.errors import UnsupportedModelError
from saap.core.records import AxisSlice, CoupledGroup, ModelGraph, Role, Side
from saap.estimation.importance import channel_change, element_importance, units_of, weight_product
from saap.models.structure.linear import contracted_axis, owner
from saap.settings.prune import ElementOrder


@dataclass(frozen=True, slots=True)
class Part:
    """One member of one group: some channels of a linear module, with their biases where those leave too.

    position: of the part among the group's parts. axis: of the weight. channels, biases: (units, width) indices of
    the weight's axis and of the bias.
    """

    group: str
    position: int
    axis: int
    channels: Tensor
    biases: Tensor | None


@dataclass(frozen=True, slots=True)
class GroupParts:
    """Units and parts of a group, and which part `last` means: the last that reads the group's channels."""

    units: int
    parts: int
    last: int


@dataclass(frozen=True, slots=True)
class Taps:
    """All parts by decoder block and module path, and the groups they make up.

    stacked: parts in one matrix of a stacked tensor (an expert's), by decoder block, tensor and place in the stack.
    whole: parts whose units are the matrices themselves, as (group, position) by decoder block and tensor. Both are
    scored from the weight's own gradient, one sample at a time.
    """

    by_block: Mapping[int, Mapping[str, Sequence[Part]]]
    groups: Mapping[str, GroupParts]
    stacked: Mapping[int, Mapping[str, Mapping[int, Sequence[Part]]]]
    whole: Mapping[int, Mapping[str, tuple[str, int]]]

    def by_gradient(self, block: int) -> tuple[str, ...]:
        """Tensors of a block that are scored from their own gradient."""
        return tuple(dict.fromkeys([*self.stacked.get(block, {}), *self.whole.get(block, {})]))

    def complete_at(self) -> dict[int, list[str]]:
        """Groups by the first block that has a part of them: backward, they are complete there."""
        names: dict[int, set[str]] = defaultdict(set)
        for block, paths in self.by_block.items():
            names[block] |= {part.group for found in paths.values() for part in found}
        for block, tensors in self.stacked.items():
            names[block] |= {part.group for places in tensors.values() for found in places.values() for part in found}
        for block, whole in self.whole.items():
            names[block] |= {group for group, _ in whole.values()}
        first = {name: block for block in sorted(names, reverse=True) for name in names[block]}
        return {block: [name for name in self.groups if first[name] == block] for block in names}


def make_taps(model: nn.Module, graph: ModelGraph, groups: Sequence[CoupledGroup]) -> Taps:
    """Find the parts of the groups.

    Scored are members in linear-like modules inside decoder blocks: weights, and the biases of the same channels as
    parts of them; and members in stacked tensors. Weights of norms, embeddings and the head are not. A group without
    any scored member is refused by UnsupportedModelError.
    """
    by_block: defaultdict[int, defaultdict[str, list[Part]]] = defaultdict(lambda: defaultdict(list))
    stacked: defaultdict[int, defaultdict[str, defaultdict[int, list[Part]]]]
    stacked = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    whole: defaultdict[int, dict[str, tuple[str, int]]] = defaultdict(dict)
    found: dict[str, GroupParts] = {}
    for group in groups:
        if group.role is Role.EXPERT:
            stacks = [member.tensor for member in group.members if len(graph.shapes[member.tensor]) > 2]
            for position, tensor in enumerate(stacks):
                whole[group.layer][tensor] = (group.name, position)
            found[group.name] = GroupParts(group.units, len(stacks), len(stacks) - 1)
            continue
        weights, biases = _linear_members(model, graph, group)
        if not weights:
            raise UnsupportedModelError(
                f"{group.name} has no member in a linear module, so its units cannot be scored",
                "Leave out its role with --roles",
            )
        last = 0
        for position, member in enumerate(weights):
            path = member.tensor.rpartition(".")[0]
            module, _ = owner(model, member.tensor)
            if member.part is not None:
                part = Part(group.name, position, member.axis - 1, _index(member, group.units, module), None)
                stacked[graph.block_of(member.tensor)][member.tensor][member.part].append(part)
                last = position if member.side is Side.CONSUMER else last
                continue
            produces = member.axis != contracted_axis(module)
            bias = biases.get((path, _place(member))) if produces else None
            channels = _index(member, group.units, module)
            biases_of_part = None if bias is None else _index(bias, group.units, module)
            part = Part(group.name, position, member.axis, channels, biases_of_part)
            by_block[graph.block_of(member.tensor)][path].append(part)
            last = last if produces else position
        found[group.name] = GroupParts(group.units, len(weights), last)
    return Taps(by_block, found, stacked, whole)


def _linear_members(
    model: nn.Module, graph: ModelGraph, group: CoupledGroup
) -> tuple[list[AxisSlice], dict[tuple[str, tuple[int, ...]], AxisSlice]]:
    """The group's weights in linear modules and stacks of blocks, and the biases of these by path and place."""
    weights: list[AxisSlice] = []
    biases: dict[tuple[str, tuple[int, ...]], AxisSlice] = {}
    for member in group.members:
        module, attribute = owner(model, member.tensor)
        if graph.block_of(member.tensor) < 0 or (member.part is None and contracted_axis(module) is None):
            continue
        if attribute == "weight" or member.part is not None:
            weights.append(member)
        elif attribute == "bias":
            biases[member.tensor.rpartition(".")[0], _place(member)] = member
    return weights, biases


def _place(member: AxisSlice) -> tuple[int, ...]:
    return (member.offset, member.width, member.stride, member.period, member.jump)


def _index(member: AxisSlice, units: int, module: nn.Module) -> Tensor:
    index = torch.tensor(member.indices(range(units)), dtype=torch.long)
    return index.view(units, member.width).to(next(module.parameters()).device)


@dataclass(slots=True)
class PartScores:
    """Signed sums of P and element-wise importance of one part in one micro-batch, both (samples, units)."""

    change: Tensor
    element: Tensor


class Scratch:
    """Two matrices of any needed shape, of which only the largest is ever allocated."""

    def __init__(self) -> None:
        self._stores: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def like(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices of the weight's shape in at least float32, which stay valid until the next call."""
        kind = torch.promote_types(weight.dtype, torch.float32)
        key = (kind, weight.device)
        if key not in self._stores or self._stores[key][0].numel() < weight.numel():
            self._stores.pop(key, None)
            self._stores[key] = (
                torch.empty(weight.numel(), dtype=kind, device=weight.device),
                torch.empty(weight.numel(), dtype=kind, device=weight.device),
            )
        first, second = (store[: weight.numel()].view(weight.shape) for store in self._stores[key])
        return first, second


@dataclass(frozen=True, slots=True)
class Batch:
    """Shape of a micro-batch, and the element order to score."""

    samples: int
    length: int
    order: ElementOrder

    def by_sample(self, tensor: Tensor, path: str) -> Tensor:
        """View an activation as (samples, tokens, channels)."""
        if tensor.dim() >= 3 and tensor.shape[0] == self.samples:
            return tensor.reshape(self.samples, -1, tensor.shape[-1])
        if tensor.dim() == 2 and tensor.shape[0] == self.samples * self.length:
            return tensor.reshape(self.samples, self.length, tensor.shape[-1])
        if self.samples == 1:
            return tensor.reshape(1, -1, tensor.shape[-1])
        raise UnsupportedModelError(
            f"{path} sees tokens of {self.samples} samples mixed in a tensor of shape {tuple(tensor.shape)}",
            "Score one sample at a time (micro_batch=1)",
        )


class ModuleTap:
    """Scores the parts in one linear module from its input, its output and their gradients.

    scores: by group name and part position; filled when the block's backward pass has run.
    """

    def __init__(self, path: str, module: nn.Module, parts: Sequence[Part], batch: Batch, scratch: Scratch) -> None:
        contracted = contracted_axis(module)
        if contracted is None or not isinstance(module.weight, Tensor):
            raise TypeError(f"{path} is not a linear-like module")
        self.path = path
        self.weight = module.weight
        self.bias = module.bias if isinstance(module.bias, Tensor) else None
        self.contracted = contracted
        self.readers = [part for part in parts if part.axis == contracted]
        self.makers = [part for part in parts if part.axis != contracted]
        self.batch = batch
        self.scratch = scratch
        self.scores: dict[tuple[str, int], PartScores] = {}
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._version = 0

    def before(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook. The input goes on as an alias, whose gradient is that of this module alone."""
        if self._input is not None or self.scores:
            raise UnsupportedModelError(
                f"{self.path} runs twice in one forward, so its gradient is not that of one call",
                "Leave out the role it belongs to with --roles",
            )
        self._input = arguments[0].detach()
        if not self.readers:
            return arguments
        alias = arguments[0].view_as(arguments[0])
        alias.register_hook(self._on_input_gradient)
        return (alias, *arguments[1:])

    def after(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook."""
        if self.makers:
            self._output, self._version = output.detach(), output._version
        output.register_hook(self._on_output_gradient)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """After the backward pass. Raises UnsupportedModelError if the module ran but its scores are missing."""
        if self._input is not None:
            raise UnsupportedModelError(
                f"The output of {self.path} is changed in place or not used, so its gradient cannot be seen",
                "Use operations that make new tensors, or leave out the role it belongs to with --roles",
            )

    def _on_output_gradient(self, gradient: Tensor) -> None:
        if self._input is None:
            raise RuntimeError(f"{self.path}: gradient without a forward")
        if self._output is not None and self._output._version != self._version:
            return
        gradient = self.batch.by_sample(gradient, self.path)
        elements = self._elements(self.batch.by_sample(self._input, self.path), gradient)
        if self._output is not None:
            self._score_makers(self.batch.by_sample(self._output, self.path), gradient, elements)
        for part in self.readers:
            element = units_of(elements[part.axis], part.channels)
            self.scores[part.group, part.position] = PartScores(torch.zeros_like(element), element)
        self._output = None
        if not self.readers:
            self._input = None

    def _on_input_gradient(self, gradient: Tensor) -> None:
        if self._input is None:
            raise RuntimeError(f"{self.path}: gradient without a forward")
        read = self.batch.by_sample(self._input, self.path)
        change = channel_change(read, self.batch.by_sample(gradient, self.path))
        for part in self.readers:
            self.scores[part.group, part.position].change = units_of(change, part.channels)
        self._input = None

    def _score_makers(self, output: Tensor, gradient: Tensor, elements: dict[int, Tensor]) -> None:
        change = channel_change(output, gradient)
        bias_change = bias_element = None
        if self.bias is not None:
            bias_change = gradient.sum(1, dtype=change.dtype) * self.bias
            change = change - bias_change
            product = bias_change.reshape(-1, 1)
            element = element_importance(
                product, self.batch.length - 1, self.batch.order, 0, scratch=torch.empty_like(product)
            )
            bias_element = element.view_as(bias_change)
        for part in self.makers:
            score = PartScores(units_of(change, part.channels), units_of(elements[part.axis], part.channels))
            if part.biases is not None and bias_change is not None and bias_element is not None:
                score.change = score.change + units_of(bias_change, part.biases)
                score.element = score.element + units_of(bias_element, part.biases)
            self.scores[part.group, part.position] = score

    def _elements(self, read: Tensor, gradient: Tensor) -> dict[int, Tensor]:
        """Element-wise importance of the channels along each needed axis of the weight, (samples, channels)."""
        product, scratch = self.scratch.like(self.weight)
        axes = {part.axis for part in (*self.readers, *self.makers)}
        result = {axis: product.new_empty(self.batch.samples, self.weight.shape[axis]) for axis in axes}
        for sample in range(self.batch.samples):
            weight_product(self.weight, read[sample], gradient[sample], self.contracted, product)
            for axis, rows in result.items():
                rows[sample] = element_importance(product, self.batch.length - 1, self.batch.order, axis, scratch)
        return result


@contextmanager
def watching(
    model: nn.Module, parts: Mapping[str, Sequence[Part]], batch: Batch, scratch: Scratch
) -> Iterator[list[ModuleTap]]:
    """Hooks on the modules of one block; inside the context one forward and one backward of the block may run."""
    taps: list[ModuleTap] = []
    handles = []
    try:
        for path, here in parts.items():
            module = model.get_submodule(path)
            tap = ModuleTap(path, module, here, batch, scratch)
            taps.append(tap)
            handles.append(module.register_forward_pre_hook(tap.before))
            handles.append(module.register_forward_hook(tap.after))
        yield taps
        for tap in taps:
            tap.finish()
    finally:
        for handle in handles:
            handle.remove()
