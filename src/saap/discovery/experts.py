"""Whole experts: matrices stacked along one axis, and the rows of the router that selects among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from saap.core.records import AxisSlice, IntArray, Side
from saap.discovery.tags import UNTAGGED, Choice

Axis = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router selects among its experts.

    routers: axes whose indices are the experts. experts: their number. least: experts that must stay, of each group.
    groups: number of equal groups of neighbouring experts, from the best of which the experts are selected.
    """

    routers: tuple[Axis, ...]
    experts: int
    least: int
    groups: int = 1

    def members(self, stacks: Iterable[str]) -> tuple[AxisSlice, ...]:
        """Slices of the routers and the stacks, those of one group of experts after those of another."""
        axes, size = [*self.routers, *((name, 0) for name in stacks)], self.experts // self.groups
        return tuple(_slice(*axis, group * size) for group in range(self.groups) for axis in axes)


def expert_buffers(module: nn.Module, path: str, experts: int, groups: int) -> tuple[AxisSlice, ...]:
    """Slices of the buffers inside the module at `path` that have one number per expert, such as correction biases."""
    axes = [
        (f"{path}.{name}", buffer.shape.index(experts))
        for name, buffer in module.named_buffers()
        if buffer.numel() == experts and experts in buffer.shape
    ]
    return tuple(_slice(*axis, group * (experts // groups)) for group in range(groups) for axis in axes)


def _slice(tensor: str, axis: int, offset: int) -> AxisSlice:
    return AxisSlice(tensor=tensor, axis=axis, side=Side.PRODUCER, offset=offset, width=1, stride=1)


def find_routing(
    rows: Mapping[Axis, Sequence[int]], choices: Sequence[Choice], units: IntArray, count: int
) -> Routing | None:
    """The routing among `count` experts of one block; None if no selection among channels of its tensors is found.

    rows: units of the axes that may belong to a router. choices: all selections of the model. units: unit of each tag.
    The trace does not couple experts and router, since the routing is data-dependent. They are matched by size, and
    removal is compared with masking on a small model as for any other group.
    """
    for choice in choices:
        tags = choice.rows[0]
        if len(choice.rows) > 1 or len(tags) != count or bool((tags < 0).any()):
            continue
        chosen = {*units[tags].tolist()}
        routers = tuple(axis for axis, row in rows.items() if len(row) == count and chosen.issuperset(row))
        if routers:
            alike = [one.count for one in choices if torch.equal(one.rows, choice.rows)]
            # A router without top-k takes one maximum after the other.
            least = max(*alike, len(alike) if max(alike) == 1 else 0)
            scales = tuple(_indexed_by_expert(rows, routers, count))
            return _in_groups(Routing((*routers, *scales), count, least), choice, choices)
    return None


def _indexed_by_expert(rows: Mapping[Axis, Sequence[int]], routers: Sequence[Axis], count: int) -> Iterator[Axis]:
    """Vectors of one number per expert beside or above a router; read at the selected experts, tied to nothing else."""
    for (name, axis), row in rows.items():
        path, units = name.rpartition(".")[0], {*row}
        around = any(router.startswith(f"{path}.") and router != name for router, _ in routers)
        if not around or (name, 1) in rows or not len(row) == len(units) == count:
            continue
        if all(units.isdisjoint(others) for (other, _), others in rows.items() if other != name):
            yield name, axis


def _in_groups(routing: Routing, choice: Choice, choices: Sequence[Choice]) -> Routing:
    """The routing with its groups of experts, if the same tags are also selected from group by group.

    As many groups as can be selected must have enough experts together. If their number is not known, one group must.
    """
    inside = [one for one in choices if len(one.rows) > 1 and torch.equal(one.rows.flatten(), choice.rows[0])]
    if not inside:
        return routing
    groups = len(inside[0].rows)
    values = torch.full((1, groups), UNTAGGED)
    selected = [one.count for one in choices if one.module == choice.module and torch.equal(one.rows, values)]
    least = max(-(-routing.least // max(selected, default=1)), *(one.count for one in inside))
    return Routing(routing.routers, routing.experts, least, groups)
