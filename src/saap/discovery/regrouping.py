"""The channels of a group as other units: query heads inside KV groups, or one head of each block of a fused tensor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from saap.core.records import AxisSlice, Role, Side
from saap.discovery.groups import TracedGroup
from saap.discovery.slices import slices_of


def query_heads(group: TracedGroup) -> TracedGroup | None:
    """The query heads of attention: unit u is head u of each KV group. None where each group has one head.

    Channels of queries are those members that are wider than keys and values, by the number of heads in a group. That
    follows from sizes alone; removal is compared with masking on a small model as for any other group.
    """
    narrow = min((member.width for member in group.members), default=0)
    wide = [member for member in group.members if member.width > narrow]
    widths = {member.width for member in wide}
    if group.refusal is not None or group.role is not Role.ATTENTION or len(widths) != 1:
        return None
    heads, rest = divmod(widths.pop(), narrow)
    if rest or not any(member.side is Side.CONSUMER for member in wide):
        return None
    spanned = tuple(norm for norm in group.scaled_norms if any(m.tensor.rpartition(".")[0] == norm for m in wide))
    members = tuple(
        replace(member, offset=member.rows(unit).start, width=narrow, stride=narrow, period=0, jump=0)
        for unit in range(group.units)
        for member in wide
    )
    return replace(group, role=Role.QUERY, units=heads, members=members, scaled_norms=spanned, shares=group.units)


def one_of_each_block(group: TracedGroup) -> TracedGroup | None:
    """The group with coarser units: together, those at the same place of each block of a tensor.

    A module that reshapes a fused projection into a fixed number of blocks can lose one head of each block, but none
    alone. None where no member is made of blocks, or of blocks of several sizes.
    """
    periods = {member.period for member in group.members if member.period}
    if len(periods) != 1:
        return None
    (period,) = periods
    if not 1 < period < group.units or group.units % period:
        return None
    rows: dict[tuple[str, int, Side], list[list[int]]] = {}
    for member in group.members:
        places = rows.setdefault((member.tensor, member.axis, member.side), [[] for _ in range(period)])
        for unit in range(group.units):
            places[unit % period] += member.rows(unit)
    members: list[AxisSlice] = []
    for (tensor, axis, side), places in rows.items():
        slices = slices_of(np.sort(np.array(places, dtype=np.int64), axis=1), tensor, axis, side)
        if slices is None:
            return None
        members += slices
    return replace(group, units=period, members=tuple(members))
