"""Kept indices of every tensor, axis by axis: made from groups and their kept units, read by all that cut or mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from saap.core.errors import PlanError
from saap.core.records import AxisSlice, CoupledGroup, IntArray, ModelGraph, Role

Shape = tuple[int, ...]
Kept = Sequence[int] | int
"""Kept units, or only their number where nothing but sizes is wanted."""


class Coupled(Protocol):
    """Slices that lose units together: a coupled group, or one that discovery still checks."""

    @property
    def units(self) -> int: ...  # noqa: D102

    @property
    def members(self) -> tuple[AxisSlice, ...]: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAxis:
    """What stays of one axis of a tensor.

    size: of the axis before. removed: the indices that do not stay, ascending; by part where axis 0 stacks matrices
    (experts) that lose indices of their own, else under None.
    """

    axis: int
    size: int
    removed: Mapping[int | None, IntArray]

    def kept(self, part: int | None = None) -> IntArray:
        """The indices that stay, ascending."""
        return np.delete(np.arange(self.size), self.removed.get(part, []))

    @property
    def stacked(self) -> bool:
        """Whether each matrix of a stack has removed indices of its own."""
        return None not in self.removed

    def select(self, tensor: Tensor) -> Tensor:
        """The tensor cut to what stays; all parts of a stack keep the same number."""
        if not self.stacked:
            return tensor.index_select(self.axis, _index(self.kept(), tensor))
        return torch.stack(
            [matrix.index_select(self.axis - 1, _index(self.kept(p), tensor)) for p, matrix in enumerate(tensor)]
        )

    @contextmanager
    def zeroed(self, tensor: Tensor) -> Iterator[None]:
        """Zero what does not stay for a while, in place."""
        with ExitStack() as stack:
            for part, indices in self.removed.items():
                matrix, axis = (tensor, self.axis) if part is None else (tensor[part], self.axis - 1)
                index = _index(indices, tensor)
                stack.callback(matrix.index_copy_, axis, index, matrix.index_select(axis, index))
                matrix.index_fill_(axis, index, 0.0)
            yield


def _index(indices: IntArray, tensor: Tensor) -> Tensor:
    return torch.from_numpy(indices).to(tensor.device)


class KeepIndex(Mapping[str, Mapping[int, KeptAxis]]):
    """Tensor -> axis -> what stays of it, for all that lose something. Shapes follow without any index being made.

    shapes: of the tensors before; others are left out. choices: groups and their kept units.
    """

    def __init__(self, shapes: Mapping[str, Shape], choices: Iterable[tuple[Coupled, Kept]]) -> None:
        self._before = shapes
        self._losses: dict[str, dict[int, list[tuple[AxisSlice, int, Callable[[], IntArray]]]]] = {}
        for group, kept in choices:
            lost = group.units - (kept if isinstance(kept, int) else len(kept))
            removed = cache(partial(_removed, group.units, kept))
            for member in group.members if lost else ():
                if member.tensor in shapes:
                    axes = self._losses.setdefault(member.tensor, {})
                    axes.setdefault(member.axis, []).append((member, lost, removed))

    @classmethod
    def of(cls, graph: ModelGraph, keep: Mapping[str, Kept], dropped_blocks: Iterable[int] = ()) -> KeepIndex:
        """For the dense model of a graph. keep: by name of the group; others keep everything."""
        dropped = set(dropped_blocks)
        shapes = graph.shapes
        if dropped:
            shapes = {name: shape for name, shape in shapes.items() if graph.block_of(name) not in dropped}
        return cls(shapes, ((group, keep[group.name]) for group in graph.groups if group.name in keep))

    def __getitem__(self, tensor: str) -> dict[int, KeptAxis]:
        return {axis: self.axis(tensor, axis) for axis in self._losses[tensor]}

    def __iter__(self) -> Iterator[str]:
        return iter(self._losses)

    def __len__(self) -> int:
        return len(self._losses)

    def axis(self, tensor: str, axis: int) -> KeptAxis:
        """What stays of any axis, also of one that loses nothing."""
        removed: dict[int | None, list[IntArray]] = {}
        for member, _, units in self._losses.get(tensor, {}).get(axis, ()):
            removed.setdefault(member.part, []).append(member.indices(units()))
        found = {part: np.unique(np.concatenate(indices)) for part, indices in removed.items()}
        return KeptAxis(axis=axis, size=self._before[tensor][axis], removed=found or {None: np.empty(0, np.int64)})

    def shape(self, tensor: str) -> Shape:
        """Shape of a tensor after the removal."""
        shape = list(self._before[tensor])
        for axis, losses in self._losses.get(tensor, {}).items():
            part = losses[0][0].part  # all parts of a stack lose the same number
            shape[axis] -= sum(member.width * lost for member, lost, _ in losses if member.part == part)
        return tuple(shape)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of all tensors after the removal."""
        return {tensor: self.shape(tensor) for tensor in self._before}


def _removed(units: int, kept: Kept) -> IntArray:
    """Units that are not kept, ascending."""
    return np.delete(np.arange(units), np.fromiter(range(kept) if isinstance(kept, int) else kept, np.int64))


def require_possible(graph: ModelGraph, keep: Mapping[str, Sequence[int]], dropped_blocks: Sequence[int] = ()) -> None:
    """Raise PlanError unless the model can lose what `keep` leaves out, and the blocks."""
    unknown = sorted(set(keep) - {group.name for group in graph.groups})
    if unknown:
        raise PlanError(
            f"The plan names groups that the model does not have: {', '.join(unknown)}", "See `saap inspect MODEL`"
        )
    counts: dict[str, tuple[str, int]] = {}
    for group in graph.groups:
        kept = keep.get(group.name, range(group.units))
        _require_units(group, kept)
        other, count = counts.setdefault(group.bundle or group.name, (group.name, len(kept)))
        if count != len(kept):
            raise PlanError(
                f"The plan keeps different numbers of units of {other} and {group.name}, which share their tensors",
                "Keep the same number of units of both",
            )
    wrong = [layer for layer in dropped_blocks if not 0 <= layer < len(graph.blocks)]
    if wrong or len(set(dropped_blocks)) >= len(graph.blocks):
        raise PlanError(
            f"The plan drops the blocks {list(dropped_blocks)} of {len(graph.blocks)}",
            f"Name blocks from 0 to {len(graph.blocks) - 1}, and keep at least one",
        )


def _require_units(group: CoupledGroup, kept: Sequence[int]) -> None:
    ascending = all(first < second for first, second in pairwise(kept))
    if not ascending or (kept and not (kept[0] >= 0 and kept[-1] < group.units)):
        raise PlanError(
            f"The plan's units of {group.name} are not ascending numbers from 0 to {group.units - 1}", "Correct them"
        )
    least = max(group.least, 1 if group.bundle or group.layer < 0 else 0)
    if len(kept) < least:
        raise PlanError(f"The plan keeps {len(kept)} units of {group.name}", f"Keep at least {least} of them")


def sole_consumers(graph: ModelGraph) -> dict[str, CoupledGroup]:
    """Groups inside blocks whose channels are read by exactly one module, by the path of that module."""
    return {
        group.consumers[0].tensor.rpartition(".")[0]: group
        for group in graph.groups
        if group.layer >= 0
        and group.role is not Role.QUERY
        and len(group.consumers) == 1
        and group.consumers[0].part is None
    }


def unit_channels(member: AxisSlice, units: int, device: torch.device | None = None) -> Tensor:
    """Indices of each unit along the member's axis: (units, width)."""
    return torch.as_tensor(member.indices(range(units)).reshape(units, member.width), device=device)


def units_of(channels: Tensor, index: Tensor) -> Tensor:
    """Sum over the channels of each unit. channels: (..., channels), index: (units, width). Returns (..., units)."""
    return channels[..., index].sum(-1)
