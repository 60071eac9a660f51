"""Kept indices of every tensor, axis by axis, from groups and their kept units; used for cutting and masking."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from saap.core.errors import PlanError
from saap.core.records import AxisSlice, CoupledGroup, IntArray, ModelGraph, Role

Shape = tuple[int, ...]
Kept = Sequence[int] | int
"""Kept units, or only their number if only sizes are needed."""


@dataclass(frozen=True)
class KeptAxis:
    """Kept indices of one axis of a tensor.

    size: of the axis before removal. losses: members that lose units along it, with all and with the kept units of
    each.
    """

    axis: int
    size: int
    losses: list[tuple[AxisSlice, int, Sequence[int]]] = field(default_factory=list)

    @cached_property
    def removed(self) -> dict[int | None, IntArray]:
        """The removed indices, ascending.

        By part if axis 0 stacks matrices (experts) with different removed indices, else under None.
        """
        found: dict[int | None, list[IntArray]] = {} if self.losses else {None: [np.empty(0, np.int64)]}
        for member, units, kept in self.losses:
            removed = np.delete(np.arange(units), np.fromiter(kept, np.int64))
            found.setdefault(member.part, []).append(member.indices(removed))
        return {part: np.unique(np.concatenate(indices)) for part, indices in found.items()}

    @property
    def kept_size(self) -> int:
        """Number of kept indices; all parts of a stack keep the same number."""
        part = self.losses[0][0].part
        return self.size - sum(m.width * (units - len(kept)) for m, units, kept in self.losses if m.part == part)

    def kept(self, part: int | None = None) -> IntArray:
        """The kept indices, ascending."""
        return np.delete(np.arange(self.size), self.removed.get(part, []))

    def select(self, tensor: Tensor) -> Tensor:
        """The tensor cut to the kept indices; all parts of a stack keep the same number."""
        if None in self.removed:
            return tensor.index_select(self.axis, _index(self.kept(), tensor))
        return torch.stack(
            [matrix.index_select(self.axis - 1, _index(self.kept(p), tensor)) for p, matrix in enumerate(tensor)]
        )

    @contextmanager
    def zeroed(self, tensor: Tensor) -> Iterator[None]:
        """Context in which the removed entries are zero, in place."""
        with ExitStack() as stack:
            for part, indices in self.removed.items():
                matrix, axis = (tensor, self.axis) if part is None else (tensor[part], self.axis - 1)
                index = _index(indices, tensor)
                stack.callback(matrix.index_copy_, axis, index, matrix.index_select(axis, index))
                matrix.index_fill_(axis, index, 0.0)
            yield


def _index(indices: IntArray, tensor: Tensor) -> Tensor:
    return torch.from_numpy(indices).to(tensor.device)


class KeepIndex(dict[str, dict[int, KeptAxis]]):
    """Kept indices by tensor and axis, for all tensors that lose units. Shapes are computed without index tensors.

    shapes: of the tensors before removal; others are left out, buffers too if only parameters are given. choices:
    groups and their kept units.
    """

    def __init__(self, shapes: Mapping[str, Shape], choices: Iterable[tuple[CoupledGroup, Kept]]) -> None:
        super().__init__()
        self._before = shapes
        for group, given in choices:
            kept = range(given) if isinstance(given, int) else given
            for member in (*group.members, *group.buffers) if len(kept) < group.units else ():
                if member.tensor in shapes:
                    axis = self.setdefault(member.tensor, {}).setdefault(
                        member.axis, KeptAxis(member.axis, shapes[member.tensor][member.axis])
                    )
                    axis.losses.append((member, group.units, kept))

    @classmethod
    def of(cls, graph: ModelGraph, keep: Mapping[str, Kept], dropped_blocks: Iterable[int] = ()) -> KeepIndex:
        """For the dense model of a graph. keep: by name of the group; others keep everything."""
        dropped, shapes = set(dropped_blocks), graph.shapes
        if dropped:
            shapes = {name: shape for name, shape in shapes.items() if graph.block_of(name) not in dropped}
        return cls(shapes, ((group, keep[group.name]) for group in graph.groups if group.name in keep))

    def axis(self, tensor: str, axis: int) -> KeptAxis:
        """Kept indices of any axis, also of one that keeps all."""
        return self.get(tensor, {}).get(axis) or KeptAxis(axis, self._before[tensor][axis])

    def shape(self, tensor: str) -> Shape:
        """Shape of a tensor after the removal."""
        axes = self.get(tensor, {})
        return tuple(axes[n].kept_size if n in axes else size for n, size in enumerate(self._before[tensor]))

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of all tensors after the removal."""
        return {tensor: self.shape(tensor) for tensor in self._before}


def require_possible(graph: ModelGraph, keep: Mapping[str, Sequence[int]], dropped_blocks: Sequence[int] = ()) -> None:
    """Raise PlanError unless the units that are not in `keep`, and the blocks, can be removed."""
    unknown = sorted(set(keep) - {group.name for group in graph.groups})
    if unknown:
        raise PlanError(
            f"The plan has groups that the model does not have: {', '.join(unknown)}", "See `saap inspect MODEL`"
        )
    counts: dict[str, tuple[str, int]] = {}
    owners: dict[tuple[str, int], str] = {}
    for group in graph.groups:
        kept = keep.get(group.name, range(group.units))
        for member in group.members if len(kept) < group.units else ():
            name = group.bundle or group.name
            if owners.setdefault((member.tensor, member.axis), name) != name:
                raise PlanError(
                    f"The groups {owners[member.tensor, member.axis]} and {group.name} share an axis of "
                    f"{member.tensor}", "Prune only one of their roles"
                )  # fmt: skip
        if list(kept) != sorted(set(range(group.units)).intersection(kept)):
            raise PlanError(
                f"The plan's units of {group.name} are not ascending numbers from 0 to {group.units - 1}",
                "Correct them",
            )
        least = max(group.least, 1 if group.bundle or group.layer < 0 else 0)
        if len(kept) < least:
            reason = ", as many as a token may be routed to" if group.role is Role.EXPERT else ""
            raise PlanError(
                f"The plan keeps {len(kept)} units of {group.name}", f"Keep at least {least} of them{reason}"
            )
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
            f"Use blocks from 0 to {len(graph.blocks) - 1}, and keep at least one",
        )


def sole_consumers(graph: ModelGraph, roles: Collection[Role] = tuple(Role)) -> dict[str, CoupledGroup]:
    """Groups of these roles inside blocks whose channels have exactly one consumer, by the path of that module."""
    return {
        group.consumers[0].tensor.rpartition(".")[0]: group
        for group in graph.groups
        if group.layer >= 0
        and group.role in roles
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
