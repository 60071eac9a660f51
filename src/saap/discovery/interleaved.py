"""Groups whose units lie in several blocks of a fused tensor that must keep equal sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from saap.core.records import AxisSlice, IntArray, Side
from saap.discovery.groups import TracedGroup
from saap.discovery.slices import patterns_of


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
        indices: IntArray = np.sort(np.array(places, dtype=np.int64), axis=1)
        patterns = patterns_of(indices)
        if patterns is None:
            return None
        members += [pattern.of(tensor, axis, side) for pattern in patterns]
    return replace(group, units=period, members=tuple(members))
