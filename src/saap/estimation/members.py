"""Which weights of the coupled groups are scored, and where their units lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from saap.core.errors import UnsupportedModelError
from saap.core.records import AxisSlice, CoupledGroup, ModelGraph, Role, Side
from saap.models.structure.keep_index import unit_channels
from saap.models.structure.linear import contracted_axis, owner


@dataclass(frozen=True, slots=True)
class Part:
    """One member of one group: some channels of a matrix, with their biases where those are removed too.

    position: of the part among the group's parts. axis: of the matrix. channels, biases: (units, width) indices of
    the matrix' axis and of the bias.
    """

    group: str
    position: int
    axis: int
    channels: Tensor
    biases: Tensor | None = None


@dataclass(frozen=True, slots=True)
class GroupParts:
    """How many units and parts a group has, and which part `last` means: the last that reads the group's channels.

    first_block: the first decoder block with a part; on the way back, the group is complete there.
    """

    units: int
    parts: int
    last: int
    first_block: int


@dataclass(frozen=True, slots=True)
class ScoredParts:
    """All parts, and the groups that they make up.

    linear: by path of the linear module. stacked: parts in one matrix of a stacked tensor (an expert's), by tensor and
    place in the stack. whole: parts whose units are the matrices themselves, as (group, position) by tensor.
    """

    groups: dict[str, GroupParts] = field(default_factory=dict)
    linear: dict[str, list[Part]] = field(default_factory=dict)
    stacked: dict[str, dict[int, list[Part]]] = field(default_factory=dict)
    whole: dict[str, tuple[str, int]] = field(default_factory=dict)


def scored_parts(model: nn.Module, graph: ModelGraph, groups: Sequence[CoupledGroup]) -> ScoredParts:
    """Find the parts of the groups.

    Scored are members in linear-like modules inside decoder blocks: weights, and the biases of the same channels as
    parts of them; and members in stacked tensors. Weights of norms, embeddings and the head are not. A group without
    any scored member is refused by UnsupportedModelError.
    """
    found = ScoredParts()
    for group in groups:
        if group.role is Role.EXPERT:
            stacks = [member.tensor for member in group.members if len(graph.shapes[member.tensor]) > 2]
            found.whole.update({tensor: (group.name, position) for position, tensor in enumerate(stacks)})
            found.groups[group.name] = GroupParts(group.units, len(stacks), len(stacks) - 1, group.layer)
            continue
        weights, biases = _linear_members(model, graph, group)
        if not weights:
            raise UnsupportedModelError(
                f"{group.name} has no member in a linear module, so its units cannot be scored",
                "Leave out its role with --roles",
            )
        last = 0
        for position, member in enumerate(weights):
            if not _add_part(found, model, group, position, member, biases):
                last = position
        first_block = min(graph.block_of(member.tensor) for member in weights)
        found.groups[group.name] = GroupParts(group.units, len(weights), last, first_block)
    return found


_Biases = Mapping[tuple[str, tuple[int, ...]], AxisSlice]


def _add_part(
    found: ScoredParts, model: nn.Module, group: CoupledGroup, position: int, member: AxisSlice, biases: _Biases
) -> bool:
    """Add one member. Returns whether it makes the group's channels, where it does not read them."""
    module, _ = owner(model, member.tensor)
    device = next(module.parameters()).device
    channels = unit_channels(member, group.units, device)
    if member.part is not None:
        part = Part(group.name, position, member.axis - 1, channels)
        found.stacked.setdefault(member.tensor, {}).setdefault(member.part, []).append(part)
        return member.side is not Side.CONSUMER
    path = member.tensor.rpartition(".")[0]
    produces = member.axis != contracted_axis(module)
    bias = biases.get((path, _place(member))) if produces else None
    of_bias = None if bias is None else unit_channels(bias, group.units, device)
    found.linear.setdefault(path, []).append(Part(group.name, position, member.axis, channels, of_bias))
    return produces


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
