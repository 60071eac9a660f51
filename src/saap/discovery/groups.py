"""From resolved tags to coupled groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from saap.core.records import AxisSlice, Role, Side, SlicedArgument, UnitAttribute
from saap.discovery.slices import slices_of
from saap.discovery.tags import Units
from saap.discovery.trace import Trace

Axis = tuple[str, int]


@dataclass(frozen=True, slots=True)
class TracedGroup:
    """A coupled group of the traced model, or channels that are refused.

    block: the path of its block, None for the hidden channels. label: path of the module whose channels are refused,
    where they belong to no group. refusal: why the group cannot be pruned. parts: where the members stack so many
    matrices along axis 0 (experts), each of which can lose units of its own; else 0. least: units that must stay.
    shares: where each unit is one head of each of so many KV groups, whose members follow each other in equal numbers.
    attributes, sliced_arguments: what follows the number of kept units, once removal has been tried.
    """

    block: str | None
    role: Role
    units: int
    members: tuple[AxisSlice, ...]
    scaled_norms: tuple[str, ...] = ()
    refusal: str | None = None
    label: str | None = None
    parts: int = 0
    least: int = 0
    shares: int = 0
    attributes: tuple[UnitAttribute, ...] = ()
    sliced_arguments: tuple[SlicedArgument, ...] = ()

    def refuse(self, reason: str) -> TracedGroup:
        """The group with the reason why it cannot be pruned, if there is none yet."""
        return replace(self, refusal=self.refusal or reason)


def traced_groups(trace: Trace, blocks: Sequence[str]) -> list[TracedGroup]:
    """All groups that have both producers and consumers; those that are not understood carry a refusal."""
    units = trace.space.units()
    marks = {name: set(units.of(trace.space.marked(name)).tolist()) for name in ("softmax", "product")}
    consumed = trace.space.marked("consumed")
    made = np.union1d(trace.space.marked("produced"), trace.space.marked("embedded"))
    sides = {
        (name, axis): Side.CONSUMER
        for name, axes in trace.axes.items()
        for axis, tags in enumerate(axes)
        if np.isin(tags.numpy(), consumed).any() and not np.isin(tags.numpy(), made).any()
    }
    found: list[TracedGroup] = []
    reported: set[int] = set()
    for axes, members in _clusters(units, trace.axes).items():
        if not any(axis in sides for axis in axes) or all(axis in sides for axis in axes):
            continue
        place = _place([name for name, _ in axes], blocks)
        if place is None:
            continue
        block = None if place == "" else place
        found.append(_group(trace, units, marks, sides, block, members))
        reported |= _units_on(trace, units, axes[0])
    for group in _expert_groups(trace, units, blocks):
        found.append(group)
        reported |= {root for member in group.members for root in _units_on(trace, units, (member.tensor, member.axis))}
    found = _reached(_one_hidden(_leading_out(found), blocks), trace)
    return [*found, *_stopped(trace, units, reported, blocks)]


def _expert_groups(trace: Trace, units: Units, blocks: Sequence[str]) -> list[TracedGroup]:
    """Whole experts: the matrices stacked along one axis, and the rows of the router that chooses among them.

    That stack and router belong together cannot be seen in the trace, since the choice depends on data; it follows from
    their sizes, and removal is compared with masking on a small model as for any other group.
    """
    found = []
    for block in blocks:
        axes, least = _router_and_stacks(trace, units, block)
        if axes:
            count = len(trace.axes[axes[0][0]][axes[0][1]])
            members = tuple(
                AxisSlice(tensor=name, axis=axis, side=Side.PRODUCER, offset=0, width=1, stride=1)
                for name, axis in axes
            )
            refusal = None if least < count else "each token is sent to all experts"
            found.append(TracedGroup(block, Role.EXPERT, count, members, refusal=refusal, least=least))
    return found


def _router_and_stacks(trace: Trace, units: Units, block: str) -> tuple[list[Axis], int]:
    """Axes along which the experts of a block lie, and how many experts a token is sent to; none if it has none."""
    stacked = set(trace.space.marked("stacked").tolist())
    inside = {name: axes for name, axes in trace.axes.items() if name.startswith(f"{block}.")}
    stacks = {name: axes[0] for name, axes in inside.items() if len(axes) > 2 and stacked >= set(axes[0].tolist())}
    for choice in trace.space.choices:
        chosen = set(units.of(choice.channels).tolist()) - {-1}
        size = len(choice.channels)
        routers = [
            (name, axis)
            for name, axes in inside.items()
            for axis, tags in enumerate(axes)
            if name not in stacks and len(tags) == size and chosen >= set(units.of(tags).tolist())
        ]
        if stacks and routers and all(len(tags) == size for tags in stacks.values()):
            return [*routers, *((name, 0) for name in stacks)], choice.count
    return [], 0


def _units_on(trace: Trace, units: Units, axis: Axis) -> set[int]:
    return set(units.of(trace.axes[axis[0]][axis[1]]).tolist())


def _stopped(trace: Trace, units: Units, reported: set[int], blocks: Sequence[str]) -> list[TracedGroup]:
    """Channels inside blocks that went into an operation without a rule before they made up a group."""
    found: dict[str, TracedGroup] = {}
    for name, axes in trace.axes.items():
        block = next((path for path in blocks if name.startswith(path + ".")), None)
        roots = {root for tags in axes for root in units.of(tags).tolist()}
        for root in sorted(roots & set(units.stops) - reported) if block is not None else ():
            label = name.rpartition(".")[0]
            found.setdefault(label, TracedGroup(block, Role.FFN, 0, (), (), units.stops[root], label))
    return list(found.values())


def _clusters(
    units: Units, axes: Mapping[str, tuple[Tensor, ...]]
) -> dict[tuple[Axis, ...], list[dict[Axis, list[int]]]]:
    """Units that lie on the same axes, each as its indices by axis; units on one axis alone are left out."""
    keys = [(name, axis) for name, parts in axes.items() for axis in range(len(parts))]
    roots = {key: units.of(axes[key[0]][key[1]]) for key in keys}
    owners = [np.unique(roots[key]) for key in keys if len(roots[key])]
    values, counts = np.unique(np.concatenate(owners), return_counts=True)
    several = values[counts > 1]
    indices: dict[int, dict[Axis, list[int]]] = defaultdict(dict)
    for key in keys:
        for index in np.flatnonzero(np.isin(roots[key], several)):
            indices[int(roots[key][index])].setdefault(key, []).append(int(index))
    clusters: dict[tuple[Axis, ...], list[dict[Axis, list[int]]]] = defaultdict(list)
    for unit in indices.values():
        clusters[tuple(unit)].append(unit)
    return clusters


def _place(tensors: Sequence[str], blocks: Sequence[str]) -> str | None:
    """The block that holds all tensors, "" for groups across blocks, None for groups outside of all blocks."""
    held = {next((block for block in blocks if name.startswith(block + ".")), "") for name in tensors}
    if held == {""}:
        return None
    return held.pop() if len(held) == 1 else ""


def _group(
    trace: Trace,
    units: Units,
    marks: Mapping[str, set[int]],
    sides: Mapping[Axis, Side],
    block: str | None,
    cluster: list[dict[Axis, list[int]]],
) -> TracedGroup:
    anchor = next(axis for axis in cluster[0] if axis in sides)
    cluster = sorted(cluster, key=lambda unit: unit[anchor])
    ids = [int(units.roots[trace.axes[anchor[0]][anchor[1]][unit[anchor][0]]]) for unit in cluster]
    attention = set(ids) <= marks["softmax"] & marks["product"]
    role = Role.ATTENTION if attention else Role.HIDDEN if block is None else Role.FFN
    refusal = next((why for unit in ids if (why := units.stops.get(unit) or units.spread.get(unit))), None)
    if block is not None and not attention and set(ids) & marks["product"]:
        refusal = refusal or "its channels meet in a product of activations without softmax"
    members: list[AxisSlice] = []
    for axis in cluster[0]:
        rows = [unit[axis] for unit in cluster]
        even = len({len(row) for row in rows}) == 1
        slices = slices_of(np.array(rows, np.int64), *axis, sides.get(axis, Side.PRODUCER)) if even else None
        if slices is None:
            refusal = refusal or f"its units have no regular places on axis {axis[1]} of {axis[0]}"
        members += slices or []
    norms, problem = _norms(trace, units, set(ids))
    parts = 0 if block is None else _parts(trace, members)
    if parts is None or (parts and norms):
        problem = problem or "its experts share a matrix or a norm, so they cannot choose channels of their own"
    return TracedGroup(block, role, len(cluster), tuple(members), norms, refusal or problem, parts=parts or 0)


def _parts(trace: Trace, members: Sequence[AxisSlice]) -> int | None:
    """How many matrices the members stack along axis 0; 0 if they stack none, None if only some of them do."""
    stacked = trace.space.marked("stacked")
    sizes = {
        len(trace.axes[member.tensor][0])
        if member.axis and np.isin(trace.axes[member.tensor][0].numpy(), stacked).all()
        else 0
        for member in members
    }
    return sizes.pop() if len(sizes) == 1 else None


def _norms(trace: Trace, units: Units, group: set[int]) -> tuple[tuple[str, ...], str | None]:
    """Norms that take a statistic over several of the group's units: those to rescale, or why that cannot be done."""
    scaled: list[str] = []
    for reduction in trace.space.reductions:
        rows = units.of(reduction.channels)
        across = [row for row in rows if len(np.unique(row)) > 1 and set(row.tolist()) & group]
        if not across:
            continue
        whole = all(set(row.tolist()) == group for row in across)
        if reduction.kind != "rms" or not whole:
            return (), f"{reduction.kind} in {reduction.module or 'the model'} is a statistic over its channels"
        if reduction.module not in scaled:
            scaled.append(reduction.module)
    return tuple(scaled), None


def _one_hidden(groups: list[TracedGroup], blocks: Sequence[str]) -> list[TracedGroup]:
    """Hidden channels run through all blocks; channels between some of them alone are no hidden group."""
    across = [group for group in groups if group.block is None and group.role is Role.HIDDEN]
    whole = [
        group
        for group in across
        if all(any(member.tensor.startswith(block + ".") for member in group.members) for block in blocks)
    ]
    others = [group for group in groups if group.block is not None]
    for group in groups:
        others += _shared_heads(group, blocks) if group.block is None and group.role is Role.ATTENTION else []
    if len(whole) == 1:
        return [*others, *whole]
    reason = "the channels between the blocks are not one group that runs through all of them"
    return [*others, *(replace(group, refusal=reason) for group in across[:1])]


def _shared_heads(group: TracedGroup, blocks: Sequence[str]) -> list[TracedGroup]:
    """Refuse heads of several blocks, in each of them."""
    over = [block for block in blocks if any(member.tensor.startswith(block + ".") for member in group.members)]
    reason = "its heads are tied to those of other blocks"
    return [TracedGroup(block, Role.ATTENTION, 0, (), (), reason) for block in over]


def _reached(groups: list[TracedGroup], trace: Trace) -> list[TracedGroup]:
    """Refuse hidden channels where a part of the model was not seen, which may read or write them too."""
    if not trace.unused:
        return groups
    reason = f"{min(trace.unused)} is not reached by text and may write into them"
    return [group.refuse(reason) if group.role is Role.HIDDEN else group for group in groups]


def _leading_out(groups: list[TracedGroup]) -> list[TracedGroup]:
    """Refuse an inner rank of attention: its consumers do not lead out of the block but into the heads."""
    heads = {
        (member.tensor, member.axis)
        for group in groups
        if group.role is Role.ATTENTION
        for member in group.members
        if member.side is Side.PRODUCER
    }
    reason = "its channels lead into attention, not out of the block"
    return [
        replace(group.refuse(reason), label=group.members[0].tensor.rpartition(".")[0])
        if group.role is Role.FFN
        and any((member.tensor, 1 - member.axis) in heads for member in group.members if member.side is Side.CONSUMER)
        else group
        for group in groups
    ]
