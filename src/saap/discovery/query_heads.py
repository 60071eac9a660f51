"""Query heads as units inside their KV groups."""

from __future__ import annotations

from dataclasses import replace

from saap.core.records import AxisSlice, Role, Side
from saap.discovery.groups import TracedGroup


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
    members = tuple(_heads(member, unit, narrow) for unit in range(group.units) for member in wide)
    return replace(group, role=Role.QUERY, units=heads, members=members, scaled_norms=spanned, shares=group.units)


def _heads(member: AxisSlice, unit: int, width: int) -> AxisSlice:
    return replace(member, offset=member.rows(unit).start, width=width, stride=width, period=0, jump=0)
