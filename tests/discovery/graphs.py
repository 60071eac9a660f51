"""Each family's tiny model and graph, made once."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tests.families import build

from saap.core.records import CoupledGroup, ModelGraph
from saap.discovery import discover


@functools.cache
def graph_of(family: str) -> ModelGraph:
    return discover(build(family))


def unit_sets(group: CoupledGroup) -> set[frozenset[tuple[str, int, int]]]:
    """Every unit as the set of all (tensor, axis, index) that leave with it."""
    return {
        frozenset((member.tensor, member.axis, index) for member in group.members for index in member.rows(unit))
        for unit in range(group.units)
    }


def zeroed(model: Any, group: CoupledGroup, kept: tuple[int, ...], *, consumers_only: bool = False) -> None:
    """Zero the units that are not kept, in place."""
    gone = [unit for unit in range(group.units) if unit not in kept]
    for member in group.consumers if consumers_only else group.members:
        data, axis = model.get_parameter(member.tensor).data, member.axis
        if member.part is not None:
            data, axis = data[member.part], axis - 1
        data.index_fill_(axis, torch.tensor(member.indices(gone)), 0.0)
