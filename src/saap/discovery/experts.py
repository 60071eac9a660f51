"""Whole experts: the matrices that are stacked along one axis, and the rows of the router that choose among them."""

from __future__ import annotations

from saap.core.records import AxisSlice, Side
from saap.discovery.tags import Units
from saap.discovery.trace import Trace


def expert_members(trace: Trace, units: Units, block: str) -> tuple[tuple[AxisSlice, ...], int]:
    """Members of the group of experts of a block, and how many experts a token is sent to; none where there is no such.

    That stack and router belong together cannot be seen in the trace, since the choice depends on data; it follows from
    their sizes, and removal is compared with masking on a small model as for any other group.
    """
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
            return tuple(
                _member(name, axis) for name, axis in [*routers, *((name, 0) for name in stacks)]
            ), choice.count
    return (), 0


def _member(tensor: str, axis: int) -> AxisSlice:
    return AxisSlice(tensor=tensor, axis=axis, side=Side.PRODUCER, offset=0, width=1, stride=1)
