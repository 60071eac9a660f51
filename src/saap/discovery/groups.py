"""From resolved tags to coupled groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from saap.core.records import AxisSlice, CoupledGroup, IntArray, Role, Side
from saap.discovery.blocks import holder
from saap.discovery.experts import find_routing
from saap.discovery.tags import TagSpace

Axis = tuple[str, int]
Cluster = dict[int, dict[Axis, list[int]]]
"""Units on the same axes, each as its indices by axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedGroup(CoupledGroup):
    """A coupled group of the traced copy, or unsupported channels.

    layer: in the copy. refusal: why the group cannot be pruned, "" if it can. label: path of the module of unsupported
    channels that belong to no group. parts: number of matrices stacked along axis 0 (experts), each with its own units;
    0 if not stacked. shares: number of KV groups if each unit is one head of each KV group, or of groups of experts;
    their members and buffers follow each other in equal numbers.
    """

    name: str = "group"
    units: int = 0
    members: tuple[AxisSlice, ...] = ()
    refusal: str = ""
    label: str = ""
    parts: int = 0
    shares: int = 0

    def refuse(self, reason: str) -> TracedGroup:
        """The group with the reason why it cannot be pruned, if there is none yet."""
        return replace(self, refusal=self.refusal or reason)

    def settled(self) -> list[CoupledGroup]:
        """The group, or one group for each of its stacked matrices or KV groups."""
        group = CoupledGroup(**{field.name: getattr(self, field.name) for field in fields(CoupledGroup)})
        if self.shares:
            own = [(f"{n}", self._share(self.members, n), self._share(self.buffers, n)) for n in range(self.shares)]
        else:
            own = [(f"expert.{n}", tuple(replace(m, part=n) for m in self.members), ()) for n in range(self.parts)]
        return [
            replace(group, name=f"{self.name}.{n}", bundle=self.name, members=members, buffers=buffers)
            for n, members, buffers in own
        ] or [group]

    def _share(self, slices: tuple[AxisSlice, ...], number: int) -> tuple[AxisSlice, ...]:
        count = len(slices) // self.shares
        return slices[number * count : (number + 1) * count]


class Grouping:
    """Builds the coupled groups from a trace.

    units, stops, spread: of the tags (`TagSpace.units`). rows: the unit of each index, by axis. consumers: axes whose
    channels are consumed but not produced. stacked: number of matrices stacked along axis 0 of a tensor, or of their
    biases. heads, product: units that are heads of attention, or meet in a product.
    """

    def __init__(self, space: TagSpace, blocks: Sequence[str]) -> None:
        self.space, self.blocks = space, blocks
        self.units, self.stops, self.spread = space.units()
        tags = {(name, axis): row.tolist() for name, axes in space.axes.items() for axis, row in enumerate(axes)}
        self.rows: dict[Axis, list[int]] = {axis: self.units[row].tolist() for axis, row in tags.items()}
        marks = space.marks
        self.product = {*self.units[list(marks["product"])].tolist()}
        self.heads = self.product & {*self.units[list(marks["softmax"])].tolist()}
        consumed, made = marks["consumed"], marks["produced"]
        self.consumers = {a for a, row in tags.items() if not consumed.isdisjoint(row) and made.isdisjoint(row)}
        self.stacked = self._with_leading(tags, marks["stacked"])
        looked_up = self._with_leading(tags, marks["looked up"])
        for layer in range(len(blocks)):  # biases of experts
            counts = {size for name, size in self.stacked.items() if holder(blocks, name) == layer}
            biases = {name: size for name, size in looked_up.items() if holder(blocks, name) == layer}
            self.stacked |= {name: size for name, size in biases.items() if size in counts}

    @staticmethod
    def _with_leading(tags: Mapping[Axis, Sequence[int]], marked: set[int]) -> dict[str, int]:
        """Size of the first axis of the tensors in which it is marked."""
        return {name: len(row) for (name, axis), row in tags.items() if not axis and marked.issuperset(row)}

    def groups(self) -> list[TracedGroup]:
        """All groups that have both producers and consumers; unsupported groups have a reason in `refusal`."""
        found = [group for cluster in self._clusters() if (group := self._group(cluster)) is not None]
        found += self._experts()
        reported = {unit for group in found for m in group.members for unit in self.rows[m.tensor, m.axis]}
        return [*self._one_hidden(_leading_out(found)), *self._stopped(reported)]

    def _clusters(self) -> Iterable[Cluster]:
        units: dict[int, dict[Axis, list[int]]] = defaultdict(dict)
        for axis, row in self.rows.items():
            for index, unit in enumerate(row):
                units[unit].setdefault(axis, []).append(index)
        clusters: dict[tuple[Axis, ...], Cluster] = defaultdict(dict)
        for unit, indices in units.items():
            clusters[tuple(indices)][unit] = indices
        return clusters.values()

    def _group(self, cluster: Cluster) -> TracedGroup | None:
        """The group of units on the same axes; None if they are not both produced and consumed, or in no block."""
        axes = list(next(iter(cluster.values())))
        consuming = [axis for axis in axes if axis in self.consumers]
        layers = {holder(self.blocks, name) for name, _ in axes}
        if len(consuming) in (0, len(axes)) or layers == {-1}:
            return None
        layer = layers.pop() if len(layers) == 1 else -1
        ids = sorted(cluster, key=lambda unit: cluster[unit][consuming[0]])
        role = Role.ATTENTION if self.heads.issuperset(ids) else Role.HIDDEN if layer < 0 else Role.FFN
        spread = "one of its channels acts on several units"
        problems = [self.stops.get(unit, spread if unit in self.spread else "") for unit in ids]
        if role is Role.FFN and not self.product.isdisjoint(ids):
            problems.append("its channels meet in a product of activations without softmax")
        members: list[AxisSlice] = []
        for axis in axes:
            rows = [cluster[unit][axis] for unit in ids]
            side = Side.CONSUMER if axis in self.consumers else Side.PRODUCER
            slices = slices_of(np.array(rows, np.int64), *axis, side) if len({*map(len, rows)}) == 1 else None
            if slices is None:
                problems.append(f"its units are not regularly spaced on axis {axis[1]} of {axis[0]}")
            members += slices or []
        norms, problem = self._norms(set(ids))
        parts = {self.stacked.get(member.tensor, 0) if member.axis else 0 for member in members}
        if layer >= 0 and (len(parts) != 1 or (norms and parts != {0})):
            problem = problem or "its experts share a matrix or a norm, so they cannot keep different channels"
        return TracedGroup(
            layer=layer, role=role, units=len(ids), members=tuple(members), scaled_norms=norms,
            parts=parts.pop() if layer >= 0 and len(parts) == 1 else 0,
            refusal=next(filter(None, [*problems, problem]), ""),
        )  # fmt: skip

    def _norms(self, group: set[int]) -> tuple[tuple[str, ...], str]:
        """Norms with a statistic over several of the group's units: paths of those to rescale, or why that fails."""
        scaled: dict[str, None] = {}
        for kind, module, channels in self.space.reductions:
            rows = [set(row) for row in self.units[channels].tolist()]
            across = [row for row in rows if len(row) > 1 and row & group]
            if across and (kind != "rms" or any(row != group for row in across)):
                return (), f"{kind} in {module or 'the model'} is a statistic over its channels"
            if across:
                scaled[module] = None
        return tuple(scaled), ""

    def _experts(self) -> Iterator[TracedGroup]:
        """Whole experts of every block that stacks matrices; without their buffers."""
        for layer, block in enumerate(self.blocks):
            rows = {axis: row for axis, row in self.rows.items() if axis[0].startswith(f"{block}.")}
            stacks = {name: size for name, size in self.stacked.items() if (name, 0) in rows}
            if not stacks:
                continue
            count, outside = max(stacks.values()), {axis: row for axis, row in rows.items() if axis[0] not in stacks}
            routing = find_routing(outside, self.space.choices, self.units, count)
            found = TracedGroup(layer=layer, role=Role.EXPERT)
            if {*stacks.values()} != {count}:
                sizes = " and ".join(map(str, sorted({*stacks.values()})))
                yield found.refuse(f"its matrices are those of {sizes} experts")
            elif routing is None:
                yield found.refuse(f"no router that selects among its {count} experts was found")
            else:
                found = replace(
                    found, units=count // routing.groups, members=routing.members(stacks), least=routing.least,
                    shares=routing.groups if routing.groups > 1 else 0,
                )  # fmt: skip
                each = "each token is routed to all experts" + (" of a group" if found.shares else "")
                yield found if found.least < found.units else found.refuse(each)

    def _one_hidden(self, groups: list[TracedGroup]) -> list[TracedGroup]:
        """The groups with at most one hidden group, through all blocks; heads tied across blocks are rejected."""
        found = [group for group in groups if group.layer >= 0]
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
            whole = [replace(group, refusal=reason) for group in groups if group.role is Role.HIDDEN][:1]
        if self.space.unused:
            reason = f"{min(self.space.unused)} is not used for text and may write into them"
            whole = [group.refuse(reason) for group in whole]
        return [*found, *whole]

    def _stopped(self, reported: set[int]) -> list[TracedGroup]:
        """Channels inside blocks that reached an operation without a rule before they formed a group."""
        found: dict[str, TracedGroup] = {}
        for name, axes in self.space.axes.items():
            layer, label = holder(self.blocks, name), name.rpartition(".")[0]
            units = {unit for axis in range(len(axes)) for unit in self.rows[name, axis]}
            stopped = sorted(units & set(self.stops) - reported)
            if layer >= 0 and stopped:
                reason = self.stops[stopped[0]]
                found.setdefault(label, TracedGroup(layer=layer, role=Role.FFN, refusal=reason, label=label))
        return list(found.values())


def _leading_out(groups: list[TracedGroup]) -> list[TracedGroup]:
    """Reject an inner rank of attention: its consumers lead into the heads, not out of the block."""
    heads = {(m.tensor, m.axis) for group in groups if group.role is Role.ATTENTION for m in group.producers}
    reason = "its channels lead into attention, not out of the block"
    return [
        replace(group.refuse(reason), label=group.members[0].tensor.rpartition(".")[0])
        if group.role is Role.FFN and any((member.tensor, 1 - member.axis) in heads for member in group.consumers)
        else group
        for group in groups
    ]


def query_members(members: Sequence[AxisSlice]) -> tuple[list[AxisSlice], int]:
    """Members of queries that are wider than keys and values, and the query heads of a KV group: 0 if it is not known.

    Members of queries are wider than those of keys and values by the number of heads in a group. They are identified by
    size alone; removal is compared with masking on a small model as for any other group.
    """
    narrow = min((member.width for member in members), default=0)
    wide = [member for member in members if member.width > narrow]
    widths = {member.width for member in wide}
    if not wide:
        return [], 1
    heads, rest = divmod(widths.pop(), narrow)
    known = not (widths or rest) and any(member.side is Side.CONSUMER for member in wide)
    return (wide, heads) if known else ([], 0)


def query_heads(group: TracedGroup) -> TracedGroup | None:
    """The query heads of attention: unit u is head u of each KV group. None if each KV group has one head."""
    wide, heads = query_members(group.members)
    if group.refusal or group.role is not Role.ATTENTION or not wide:
        return None
    narrow = wide[0].width // heads
    members = tuple(
        replace(member, offset=member.rows(unit).start, width=narrow, stride=narrow, period=0, jump=0)
        for unit in range(group.units)
        for member in wide
    )
    owners = {member.tensor.rpartition(".")[0] for member in wide}
    norms = tuple(norm for norm in group.scaled_norms if norm in owners)
    return replace(group, role=Role.QUERY, units=heads, members=members, scaled_norms=norms, shares=group.units)


def one_of_each_block(group: TracedGroup) -> TracedGroup | None:
    """The group with coarser units: one from each block of a tensor, at the same position.

    A module that reshapes a fused projection into a fixed number of blocks can lose one head of each block, but not a
    single head. None if no member is made of blocks, or if their sizes differ.
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
    """Slices of an axis for units with the given indices (units, width), ascending in each row.

    One slice for each run of consecutive indices of a unit, or one for each index if the runs differ between units;
    None if no affine description exists.
    """
    breaks = np.flatnonzero((np.diff(indices, axis=1) != 1).any(axis=0)) + 1
    for places in (breaks, range(1, indices.shape[1])):
        runs = np.split(indices, places, axis=1)
        slices = [found for run in runs if (found := _slice_of(run, tensor, axis, side)) is not None]
        if len(slices) == len(runs):
            return slices
    return None


def _slice_of(run: IntArray, tensor: str, axis: int, side: Side) -> AxisSlice | None:
    """The slice with these consecutive indices, (units, width); None if the units are not regularly spaced."""
    starts, (units, width) = run[:, 0].tolist(), run.shape
    stride = starts[1] - starts[0] if units > 1 else width
    period = next((n for n in range(1, units) if starts[n] - starts[n - 1] != stride), 0)
    sizes = {"offset": starts[0], "width": width, "stride": stride, "period": period}
    found = AxisSlice(tensor=tensor, axis=axis, side=side, **sizes, jump=starts[period] - starts[0])
    return found if np.array_equal(found.indices(range(units)), run.ravel()) else None
