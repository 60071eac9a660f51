"""From resolved tags to coupled groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from saap.core.records import AxisSlice, CoupledGroup, IntArray, Refusal, Role, Side
from saap.discovery.blocks import holder
from saap.discovery.trace import Trace

Axis = tuple[str, int]
Cluster = Sequence[dict[Axis, list[int]]]
"""Units that lie on the same axes, each as its indices by axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedGroup(CoupledGroup):
    """A coupled group of the traced copy, or channels that are refused.

    layer: of the copy. refusal: why the group cannot be pruned, "" if it can. label: path of the module whose channels
    are refused, where they belong to no group. parts: where the members stack so many matrices along axis 0 (experts),
    each of which can lose units of its own; else 0. shares: where each unit is one head of each of so many KV groups,
    whose members follow each other in equal numbers.
    """

    name: str = ""
    units: int = 0
    members: tuple[AxisSlice, ...] = ()
    refusal: str = ""
    label: str = ""
    parts: int = 0
    shares: int = 0

    def refuse(self, reason: str) -> TracedGroup:
        """The group with the reason why it cannot be pruned, if there is none yet."""
        return replace(self, refusal=self.refusal or reason)

    def settled(self, name: str, layer: int) -> list[CoupledGroup | Refusal]:
        """The group under its name, or one for each of the matrices or KV groups that it lies in, or its refusal."""
        if self.refusal:
            return [Refusal(name=name, reason=self.refusal)]
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(CoupledGroup)}
        group = CoupledGroup(**values | {"name": name, "layer": layer})
        if self.shares:
            each = len(self.members) // self.shares
            own = [(f"{name}.{n}", self.members[n * each : (n + 1) * each]) for n in range(self.shares)]
        else:
            parts = range(self.parts)
            own = [(f"{name}.expert.{n}", tuple(replace(m, part=n) for m in self.members)) for n in parts]
        return [replace(group, name=part, bundle=name, members=members) for part, members in own] or [group]


class Grouping:
    """Reads the coupled groups off a trace.

    rows: the unit of each index, by axis. consumers: axes whose channels are consumed and made nowhere. stacked: how
    many matrices a tensor stacks along axis 0.
    """

    def __init__(self, trace: Trace, blocks: Sequence[str]) -> None:
        self.trace, self.blocks, self.units = trace, blocks, trace.space.units()
        tags = {(name, axis): row.numpy() for name, axes in trace.axes.items() for axis, row in enumerate(axes)}
        self.rows = {axis: self.units.of(row) for axis, row in tags.items()}
        marked = trace.space.marked
        self.softmax, self.product = (set(self.units.of(marked(name)).tolist()) for name in ("softmax", "product"))
        consumed, made, stacked = marked("consumed"), marked("produced", "embedded"), marked("stacked")
        self.consumers = {a for a, row in tags.items() if np.isin(row, consumed).any() and not np.isin(row, made).any()}
        self.stacked = {
            name: len(row) for (name, axis), row in tags.items() if not axis and np.isin(row, stacked).all()
        }

    def groups(self) -> list[TracedGroup]:
        """All groups that have both producers and consumers; those that are not understood carry a refusal."""
        found, reported = [], set[int]()
        for cluster in self._clusters():
            group = self._group(cluster)
            if group is not None:
                found.append(group)
                reported |= set(self.rows[next(iter(cluster[0]))].tolist())
        for group in self._experts():
            found.append(group)
            reported |= {unit for member in group.members for unit in self.rows[member.tensor, member.axis].tolist()}
        return [*self._one_hidden(_leading_out(found)), *self._stopped(reported)]

    def _clusters(self) -> list[Cluster]:
        units: dict[int, dict[Axis, list[int]]] = defaultdict(dict)
        for axis, row in self.rows.items():
            for index, unit in enumerate(row.tolist()):
                units[unit].setdefault(axis, []).append(index)
        clusters: dict[tuple[Axis, ...], list[dict[Axis, list[int]]]] = defaultdict(list)
        for indices in units.values():
            clusters[tuple(indices)].append(indices)
        return list(clusters.values())

    def _group(self, cluster: Cluster) -> TracedGroup | None:
        """The group of units on the same axes; None where they are not both made and consumed, or in no block."""
        axes = list(cluster[0])
        consuming = [axis for axis in axes if axis in self.consumers]
        layers = {holder(self.blocks, name) for name, _ in axes}
        if len(consuming) in (0, len(axes)) or layers == {-1}:
            return None
        layer = layers.pop() if len(layers) == 1 else -1
        cluster = sorted(cluster, key=lambda unit: unit[consuming[0]])
        ids = [int(self.rows[consuming[0]][unit[consuming[0]][0]]) for unit in cluster]
        attention = set(ids) <= self.softmax & self.product
        role = Role.ATTENTION if attention else Role.HIDDEN if layer < 0 else Role.FFN
        problems = [self.units.stops.get(unit) or self.units.spread.get(unit, "") for unit in ids]
        if role is Role.FFN and set(ids) & self.product:
            problems.append("its channels meet in a product of activations without softmax")
        members: list[AxisSlice] = []
        for axis in axes:
            rows = [unit[axis] for unit in cluster]
            even = len({len(row) for row in rows}) == 1
            side = Side.CONSUMER if axis in self.consumers else Side.PRODUCER
            slices = slices_of(np.array(rows, np.int64), *axis, side) if even else None
            if slices is None:
                problems.append(f"its units have no regular places on axis {axis[1]} of {axis[0]}")
            members += slices or []
        norms, problem = self._norms(set(ids))
        parts = {self.stacked.get(member.tensor, 0) if member.axis else 0 for member in members}
        if layer >= 0 and (len(parts) != 1 or (norms and parts != {0})):
            problem = problem or "its experts share a matrix or a norm, so they cannot choose channels of their own"
        matrices = parts.pop() if layer >= 0 and len(parts) == 1 else 0
        found = TracedGroup(layer=layer, role=role, units=len(cluster), members=tuple(members), parts=matrices)
        return replace(found, scaled_norms=norms, refusal=next(filter(None, [*problems, problem]), ""))

    def _norms(self, group: set[int]) -> tuple[tuple[str, ...], str]:
        """Norms that take a statistic over several of the group's units: those to rescale, or why that fails."""
        scaled: dict[str, None] = {}
        for reduction in self.trace.space.reductions:
            rows = [set(row) for row in self.units.of(reduction.channels).tolist()]
            across = [row for row in rows if len(row) > 1 and row & group]
            if across and (reduction.kind != "rms" or any(row != group for row in across)):
                return (), f"{reduction.kind} in {reduction.module or 'the model'} is a statistic over its channels"
            if across:
                scaled[reduction.module] = None
        return tuple(scaled), ""

    def _experts(self) -> Iterator[TracedGroup]:
        """Whole experts: the matrices stacked along one axis, and the rows of the router that chooses among them.

        That stack and router belong together cannot be seen in the trace, since the choice depends on data; it follows
        from their sizes, and removal is compared with masking on a small model as for any other group.
        """
        for layer, block in enumerate(self.blocks):
            rows = {axis: row for axis, row in self.rows.items() if axis[0].startswith(f"{block}.")}
            stacks = {name: size for name, size in self.stacked.items() if (name, 2) in rows}
            for choice in self.trace.space.choices:
                chosen, count = {*self.units.of(choice.channels).tolist()}, len(choice.channels)
                routers = [
                    axis
                    for axis, row in rows.items()
                    if axis[0] not in stacks and len(row) == count and chosen >= set(row.tolist())
                ]
                if routers and set(stacks.values()) == {count}:
                    members = tuple(
                        AxisSlice(tensor=name, axis=axis, side=Side.PRODUCER, offset=0, width=1, stride=1)
                        for name, axis in (*routers, *((name, 0) for name in stacks))
                    )
                    found = TracedGroup(layer=layer, role=Role.EXPERT, units=count, members=members, least=choice.count)
                    yield found if choice.count < count else found.refuse("each token is sent to all experts")
                    break

    def _one_hidden(self, groups: list[TracedGroup]) -> list[TracedGroup]:
        """The groups with at most one hidden group, which runs through all blocks; heads of several are refused."""
        found = [group for group in groups if group.layer >= 0]
        across = [group for group in groups if group.role is Role.HIDDEN]
        whole = []
        for group in (group for group in groups if group.layer < 0):
            layers = sorted({holder(self.blocks, member.tensor) for member in group.members} - {-1})
            if group.role is Role.ATTENTION:
                reason = "its heads are tied to those of other blocks"
                found += [TracedGroup(layer=layer, role=group.role, refusal=reason) for layer in layers]
            elif len(layers) == len(self.blocks):
                whole.append(group)
        if len(whole) != 1:
            reason = "the channels between the blocks are not one group that runs through all of them"
            whole = [replace(group, refusal=reason) for group in across[:1]]
        if self.trace.unused:
            reason = f"{min(self.trace.unused)} is not reached by text and may write into them"
            whole = [group.refuse(reason) for group in whole]
        return [*found, *whole]

    def _stopped(self, reported: set[int]) -> list[TracedGroup]:
        """Channels inside blocks that went into an operation without a rule before they made up a group."""
        found: dict[str, TracedGroup] = {}
        for name, axes in self.trace.axes.items():
            layer, label = holder(self.blocks, name), name.rpartition(".")[0]
            units = {unit for axis in range(len(axes)) for unit in self.rows[name, axis].tolist()}
            stopped = sorted(units & set(self.units.stops) - reported)
            if layer >= 0 and stopped:
                reason = self.units.stops[stopped[0]]
                found.setdefault(label, TracedGroup(layer=layer, role=Role.FFN, refusal=reason, label=label))
        return list(found.values())


def _leading_out(groups: list[TracedGroup]) -> list[TracedGroup]:
    """Refuse an inner rank of attention: its consumers do not lead out of the block but into the heads."""
    heads = {(m.tensor, m.axis) for group in groups if group.role is Role.ATTENTION for m in group.producers}
    reason = "its channels lead into attention, not out of the block"
    return [
        replace(group.refuse(reason), label=group.members[0].tensor.rpartition(".")[0])
        if group.role is Role.FFN and any((member.tensor, 1 - member.axis) in heads for member in group.consumers)
        else group
        for group in groups
    ]


def query_heads(group: TracedGroup) -> TracedGroup | None:
    """The query heads of attention: unit u is head u of each KV group. None where each group has one head.

    Channels of queries are those members that are wider than keys and values, by the number of heads in a group. That
    follows from sizes alone; removal is compared with masking on a small model as for any other group.
    """
    narrow = min((member.width for member in group.members), default=0)
    wide = [member for member in group.members if member.width > narrow]
    widths = {member.width for member in wide}
    if group.refusal or group.role is not Role.ATTENTION or len(widths) != 1:
        return None
    heads, rest = divmod(widths.pop(), narrow)
    if rest or not any(member.side is Side.CONSUMER for member in wide):
        return None
    members = tuple(
        replace(member, offset=member.rows(unit).start, width=narrow, stride=narrow, period=0, jump=0)
        for unit in range(group.units)
        for member in wide
    )
    owners = {member.tensor.rpartition(".")[0] for member in wide}
    norms = tuple(norm for norm in group.scaled_norms if norm in owners)
    return replace(group, role=Role.QUERY, units=heads, members=members, scaled_norms=norms, shares=group.units)


def one_of_each_block(group: TracedGroup) -> TracedGroup | None:
    """The group with coarser units: together, those at the same place of each block of a tensor.

    A module that reshapes a fused projection into a fixed number of blocks can lose one head of each block, but none
    alone. None where no member is made of blocks, or of blocks of several sizes.
    """
    periods = {member.period for member in group.members if member.period}
    period = periods.pop() if len(periods) == 1 else 0
    if not 1 < period < group.units or group.units % period:
        return None
    rows: dict[tuple[str, int, Side], list[list[int]]] = {}
    for member in group.members:
        places = rows.setdefault((member.tensor, member.axis, member.side), [[] for _ in range(period)])
        for unit in range(group.units):
            places[unit % period] += member.rows(unit)
    found = [slices_of(np.sort(np.array(places, np.int64), axis=1), *where) for where, places in rows.items()]
    members = tuple(member for slices in found if slices is not None for member in slices)
    return None if None in found else replace(group, units=period, members=members)


def slices_of(indices: IntArray, tensor: str, axis: int, side: Side) -> list[AxisSlice] | None:
    """Describe where the units lie along an axis of a tensor.

    indices: (units, width), ascending in each row. Returns one slice for each run of consecutive indices that a unit
    has, or one for each index where the runs differ between units; None if no affine description exists.
    """
    breaks = np.flatnonzero((np.diff(indices, axis=1) != 1).any(axis=0)) + 1
    for places in (breaks, range(1, indices.shape[1])):
        runs = np.split(indices, places, axis=1)
        slices = [found for run in runs if (found := _slice_of(run, tensor, axis, side)) is not None]
        if len(slices) == len(runs):
            return slices
    return None


def _slice_of(run: IntArray, tensor: str, axis: int, side: Side) -> AxisSlice | None:
    """The slice with these consecutive indices, (units, width); None where the units are not regular."""
    starts, (units, width) = run[:, 0], run.shape
    steps = np.diff(starts)
    stride = int(steps[0]) if units > 1 else width
    jumps = np.flatnonzero(steps != stride)
    period = int(jumps[0]) + 1 if len(jumps) else 0
    offset, jump = int(starts[0]), int(starts[period] - starts[0])
    found = AxisSlice(
        tensor=tensor, axis=axis, side=side, offset=offset, width=width, stride=stride, period=period, jump=jump
    )
    return found if np.array_equal(found.indices(range(units)), run.ravel()) else None
