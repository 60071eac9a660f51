"""From index sets to the affine description of an axis: offset, width, stride, period, jump."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from saap.core.records import AxisSlice, IntArray, Side


@dataclass(frozen=True, slots=True)
class Pattern:
    """Unit u covers `width` indices from offset + (u % period) * stride + (u // period) * jump; period 0: one block."""

    offset: int
    width: int
    stride: int
    period: int = 0
    jump: int = 0

    def of(self, tensor: str, axis: int, side: Side) -> AxisSlice:
        """The units at these places of one axis of one tensor."""
        return AxisSlice(
            tensor=tensor,
            axis=axis,
            side=side,
            offset=self.offset,
            width=self.width,
            stride=self.stride,
            period=self.period,
            jump=self.jump,
        )


def patterns_of(indices: IntArray) -> list[Pattern] | None:
    """Describe where the units lie along an axis.

    indices: (units, width), ascending in each row. Returns one pattern for each run of consecutive indices that a
    unit has, or one for each index where the runs differ between units; None if no affine description exists.
    """
    runs = _common_runs(indices)
    starts = [(indices[:, first], last - first + 1) for first, last in runs]
    found = [_pattern(offsets, width) for offsets, width in starts]
    if any(pattern is None for pattern in found):
        found = [_pattern(indices[:, place], 1) for place in range(indices.shape[1])]
    patterns = [pattern for pattern in found if pattern is not None]
    return patterns if len(patterns) == len(found) else None


def _common_runs(indices: IntArray) -> list[tuple[int, int]]:
    """Places (first, last) of the runs that are consecutive in every unit."""
    breaks = np.flatnonzero((np.diff(indices, axis=1) != 1).any(axis=0))
    firsts = [0, *(int(place) + 1 for place in breaks)]
    lasts = [*(int(place) for place in breaks), indices.shape[1] - 1]
    return list(zip(firsts, lasts, strict=True))


def _pattern(starts: IntArray, width: int) -> Pattern | None:
    offset = int(starts[0])
    if len(starts) == 1:
        return Pattern(offset, width, width)
    stride = int(starts[1] - starts[0])
    jumps = np.flatnonzero(np.diff(starts) != stride)
    if not len(jumps):
        return Pattern(offset, width, stride)
    period = int(jumps[0]) + 1
    jump = int(starts[period] - starts[0])
    units = np.arange(len(starts))
    expected = offset + units % period * stride + units // period * jump
    return Pattern(offset, width, stride, period, jump) if np.array_equal(starts, expected) else None
