"""From index sets to the affine description of an axis: offset, width, stride, period, jump."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from saap.core.records import AxisSlice, IntArray, Side


def slices_of(indices: IntArray, tensor: str, axis: int, side: Side) -> list[AxisSlice] | None:
    """Describe where the units lie along an axis of a tensor.

    indices: (units, width), ascending in each row. Returns one slice for each run of consecutive indices that a unit
    has, or one for each index where the runs differ between units; None if no affine description exists.
    """
    somewhere = AxisSlice(tensor=tensor, axis=axis, side=side, offset=0, width=1, stride=1)
    for runs in (_common_runs(indices), [(place, place) for place in range(indices.shape[1])]):
        found = [_at(somewhere, indices[:, first], last - first + 1) for first, last in runs]
        slices = [one for one in found if one is not None]
        if len(slices) == len(runs):
            return slices
    return None


def _common_runs(indices: IntArray) -> list[tuple[int, int]]:
    """Places (first, last) of the runs that are consecutive in every unit."""
    breaks = np.flatnonzero((np.diff(indices, axis=1) != 1).any(axis=0))
    firsts = [0, *(int(place) + 1 for place in breaks)]
    lasts = [*(int(place) for place in breaks), indices.shape[1] - 1]
    return list(zip(firsts, lasts, strict=True))


def _at(somewhere: AxisSlice, starts: IntArray, width: int) -> AxisSlice | None:
    """The slice whose units begin at `starts`; None where they are not regular."""
    steps = np.diff(starts)
    stride = int(steps[0]) if len(steps) else width
    jumps = np.flatnonzero(steps != stride)
    period = int(jumps[0]) + 1 if len(jumps) else 0
    jump = int(starts[period] - starts[0]) if period else 0
    found = replace(somewhere, offset=int(starts[0]), width=width, stride=stride, period=period, jump=jump)
    return found if np.array_equal(found.indices(range(len(starts)))[::width], starts) else None
