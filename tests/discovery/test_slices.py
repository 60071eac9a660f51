"""Index sets and their affine description lead to each other."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from saap.core.records import AxisSlice, Side
from saap.discovery.groups import slices_of


def described(rows: list[list[int]]) -> list[AxisSlice] | None:
    return slices_of(np.array(rows), "w", 0, Side.PRODUCER)


def rows_of(slices: list[AxisSlice], units: int) -> list[list[int]]:
    return [sorted(index for one in slices for index in one.rows(unit)) for unit in range(units)]


@given(
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    units=st.integers(1, 7),
    interleaved=st.booleans(),
    offset=st.integers(0, 5),
)
def test_fused_projections_are_described_exactly(parts: list[int], units: int, interleaved: bool, offset: int) -> None:
    """Parts of several widths, either unit by unit (bloom, falcon) or part by part (phi3, gpt2)."""
    if interleaved:
        rows = [[offset + unit * sum(parts) + place for place in range(sum(parts))] for unit in range(units)]
    else:
        starts = [offset + sum(parts[:part]) * units for part in range(len(parts))]
        rows = [
            [start + unit * width + place for start, width in zip(starts, parts, strict=True) for place in range(width)]
            for unit in range(units)
        ]
    slices = described(rows)
    assert slices is not None
    assert rows_of(slices, units) == rows


@given(
    width=st.integers(1, 3),
    period=st.integers(2, 4),
    blocks=st.integers(2, 3),
    gap=st.integers(1, 5),
    offset=st.integers(0, 3),
)
def test_blocks_of_units_are_described_by_period_and_jump(
    width: int, period: int, blocks: int, gap: int, offset: int
) -> None:
    units, jump = period * blocks, period * width + gap
    rows = [
        [offset + unit // period * jump + unit % period * width + place for place in range(width)]
        for unit in range(units)
    ]
    slices = described(rows)
    assert slices is not None
    assert rows_of(slices, units) == rows
    assert [one.period for one in slices] == [period]


@given(st.lists(st.integers(0, 200), min_size=4, max_size=12, unique=True))
def test_whatever_is_described_is_described_exactly(indices: list[int]) -> None:
    rows = [[index] for index in sorted(indices)]
    slices = described(rows)
    if slices is not None:
        assert rows_of(slices, len(rows)) == rows


def test_irregular_places_have_no_description() -> None:
    assert described([[0], [1], [5], [7], [20]]) is None


@given(
    offset=st.integers(0, 5),
    width=st.integers(1, 4),
    period=st.integers(1, 4),
    units=st.integers(1, 12),
    slack=st.integers(0, 3),
)
def test_slices_of_different_units_never_overlap(offset: int, width: int, period: int, units: int, slack: int) -> None:
    stride = width + slack
    member = AxisSlice(
        tensor="w", axis=0, side=Side.PRODUCER, offset=offset, width=width, stride=stride,
        period=period, jump=period * stride + slack,
    )  # fmt: skip
    indices = member.indices(range(units)).tolist()
    assert len(set(indices)) == len(indices) == units * width
    assert indices == sorted(indices)
    assert all(list(member.rows(unit)) == member.indices([unit]).tolist() for unit in range(units))
