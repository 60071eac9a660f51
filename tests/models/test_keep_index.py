"""What stays of tensors: sizes, cutting and masking follow from the same kept units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models.test_storage import tiny_graph

from saap.core.errors import PlanError
from saap.core.records import AxisSlice, CoupledGroup, Role, Side
from saap.models.structure.keep_index import KeepIndex, require_possible


def group(units: int, *members: AxisSlice) -> CoupledGroup:
    return CoupledGroup(layer=0, role=Role.FFN, name="group", units=units, members=members)


def member(axis: int, width: int = 1, *, stride: int | None = None, part: int | None = None) -> AxisSlice:
    return AxisSlice(
        tensor="w", axis=axis, side=Side.CONSUMER, offset=1, width=width, stride=stride or width, part=part
    )


@given(units=st.integers(1, 6), width=st.integers(1, 3), gap=st.integers(0, 2), axis=st.integers(0, 1), data=st.data())
def test_cut_masked_and_counted_alike(units: int, width: int, gap: int, axis: int, data: st.DataObject) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, units - 1))))
    one = member(axis, width, stride=width + gap)
    size = 2 + units * (width + gap)
    shape = (size, 3) if axis == 0 else (3, size)
    tensor = torch.arange(3.0 * size).reshape(shape) + 1
    index = KeepIndex({"w": shape}, [(group(units, one), kept)])
    lost = {row for unit in range(units) if unit not in kept for row in one.rows(unit)}
    stays = [place for place in range(size) if place not in lost]
    found = index.axis("w", axis)
    assert found.kept().tolist() == stays
    assert torch.equal(found.select(tensor), tensor.index_select(axis, torch.tensor(stays)))
    assert index.shape("w") == tuple(found.select(tensor).shape)
    assert KeepIndex({"w": shape}, [(group(units, one), len(kept))]).shapes == index.shapes
    assert bool(index) == (len(kept) < units)
    before = tensor.clone()
    with found.zeroed(tensor):
        assert torch.equal(found.select(tensor), found.select(before))
        assert not tensor.index_select(axis, torch.tensor(sorted(lost), dtype=torch.long)).any()
    assert torch.equal(tensor, before)


def test_each_matrix_of_a_stack_keeps_indices_of_its_own() -> None:
    choices = [(group(4, member(2, part=part)), kept) for part, kept in enumerate([(0, 3), (1, 2)])]
    index = KeepIndex({"w": (2, 3, 6)}, choices)
    stack = torch.arange(36.0).reshape(2, 3, 6)
    cut = index["w"][2].select(stack)
    assert torch.equal(cut, torch.stack([stack[0][:, [0, 1, 4, 5]], stack[1][:, [0, 2, 3, 5]]]))
    assert index.shapes == {"w": (2, 3, 4)}


def test_parts_may_be_masked_unevenly() -> None:
    index = KeepIndex({"w": (2, 3, 6)}, [(group(4, member(2, part=1)), (0,))])
    stack = torch.ones(2, 3, 6)
    with index["w"][2].zeroed(stack):
        assert stack[0].all()
        assert stack[1].sum(0).tolist() == [3, 3, 0, 0, 0, 3]


def test_dropped_blocks_leave_whole() -> None:
    graph = tiny_graph()
    index = KeepIndex.of(graph, {"layers.0.ffn": (1, 2), "layers.1.ffn": (0,)}, [1])
    assert index.shapes == {"b.0.up": (2, 3), "b.0.down": (3, 2)}
    np.testing.assert_array_equal(index["b.0.down"][1].kept(), [1, 2])


@pytest.mark.parametrize(
    ("keep", "dropped", "problem"),
    [
        ({"layers.9.ffn": ()}, (), r"does not have: layers\.9\.ffn"),
        ({"layers.0.ffn": (3, 1)}, (), r"units of layers\.0\.ffn are not ascending numbers from 0 to 9"),
        ({"layers.0.ffn": (10,)}, (), "not ascending numbers from 0 to 9"),
        ({"layers.0.ffn": (1, 1)}, (), "not ascending numbers"),
        ({}, (2,), r"drops the blocks \[2\] of 2"),
        ({}, (0, 1), r"drops the blocks \[0, 1\] of 2"),
    ],
)
def test_what_a_model_cannot_lose_is_refused(
    keep: dict[str, tuple[int, ...]], dropped: tuple[int, ...], problem: str
) -> None:
    with pytest.raises(PlanError, match=problem):
        require_possible(tiny_graph(), keep, dropped)
