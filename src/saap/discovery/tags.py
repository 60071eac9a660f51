"""Channel tags: one integer per index of every parameter axis, and the ties between tags to remove together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saap.core.records import IntArray

UNTAGGED = -1
Tie = tuple[int, list[int]]


@dataclass(frozen=True, slots=True)
class ParameterTags:
    """A parameter of two or more axes, seen through transposes and slices: the tags of each axis."""

    axes: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A data-dependent selection among channels (experts).

    count: of the selected channels in each row, one for a maximum. module: path of its module. rows: (rows, channels)
    tags, each row distinct; several rows are groups of experts, each with a selection of its own. Channels that are no
    longer tagged are values of groups.
    """

    count: int
    module: str
    rows: Tensor


class TagSpace:
    """Tags of a model's parameters, and the facts about them that the walk over the graph records.

    axes: parameter -> tags of each axis. modules: paths of the modules that ran. unused: parameters that the forward
    pass on text does not reach, such as those of a vision tower.
    reductions: statistics over channels: "rms" or the name of the operation, path of the module, (rows, channels) tags.
    choices: selections among channels. marks: tags seen in a part of the model, by its name. stops: tags of channels
    that reached an unsupported operation, and why.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        sizes = [size for shape in shapes.values() for size in shape]
        rows = iter(torch.split(torch.arange(sum(sizes)), sizes))
        self.axes = {name: tuple(next(rows) for _ in shape) for name, shape in shapes.items()}
        self.modules, self.unused = set[str](), set(shapes)
        self.reductions: list[tuple[str, str, Tensor]] = []
        self.choices: list[Choice] = []
        self.marks: defaultdict[str, set[int]] = defaultdict(set)
        self.stops: list[tuple[Tensor, str]] = []
        self._count = sum(sizes)
        self._ties: list[Tensor] = []
        self._open: list[Tie] = []

    def tie(self, first: Tensor, second: Tensor) -> None:
        """Tie the channels at equal positions of two broadcastable tag tensors."""
        self._ties.append(_pairs(first, second))

    def tie_shared(self, first: Tensor, second: Tensor) -> None:
        """As `tie`, but a tag that meets several others is tied only if these are one unit.

        Otherwise the weight of a norm that all heads share, or a scalar gate, would join everything.
        """
        pairs = _pairs(first, second)
        for side in (0, 1):
            values, counts = torch.unique(pairs[side], return_counts=True)
            shared = torch.isin(pairs[side], values[counts > 1])
            partners: defaultdict[int, list[int]] = defaultdict(list)
            for owner, partner in zip(pairs[side][shared].tolist(), pairs[1 - side][shared].tolist(), strict=True):
                partners[owner].append(partner)
            self._open += partners.items()
            pairs = pairs[:, ~shared]
        self._ties.append(pairs)

    def tie_along(self, tags: Tensor, dim: int) -> None:
        """Tie all channels along `dim`."""
        size = tags.shape[dim]
        if size > 1:
            self.tie(tags.narrow(dim, 0, size - 1), tags.narrow(dim, 1, size - 1))

    def contract(self, first: Tensor, second: Tensor) -> Tensor:
        """Tags of first @ second, both activations: all summed channels and the result become one unit.

        first: (..., m, k), second: (..., k, n). Returns (..., m, n).
        """
        batch = _together(first[..., 0, 0], second[..., 0, 0])[0].shape
        first, second = first.expand(*batch, *first.shape[-2:]), second.expand(*batch, *second.shape[-2:])
        second = _without_common(second)
        self.tie_along(first, -1)
        self.tie_along(second, -2)
        rows, columns = _together(first[..., :1], second.amax(-2, keepdim=True))
        self.tie(rows, columns)
        if bool((rows >= 0).any()) and bool((columns >= 0).any()):
            self.mark("product", rows)
        # The finer tags are kept, so that later operations still distinguish the channels.
        fine, coarse = finest([rows, columns])
        return torch.where(fine < 0, coarse, fine)

    def mark(self, name: str, tags: Tensor) -> None:
        """Record that these channels occur in the part `name`."""
        self.marks[name].update(_seen(tags))

    def units(self) -> tuple[IntArray, dict[int, str], set[int]]:
        """Resolve all ties: the unit of each tag, its smallest one; the last is that of UNTAGGED.

        Also returns the reasons of unsupported units, by unit, and units that belong to several others: the weight of a
        norm that all heads share.
        """
        roots = np.arange(self._count)
        _join(roots, *torch.cat([torch.empty(2, 0, dtype=torch.long), *self._ties], dim=1).numpy())
        still_open = _settle(roots, self._open)
        # A tensor that a head's channel multiplies in several places (an output gate of grouped heads) joins the head.
        heads = {roots[tag] for tag in self.marks["softmax"] & self.marks["product"]}
        for owner, partners in still_open:
            if roots[owner] in heads:
                _join(roots, [owner] * len(partners), partners)
                heads.add(roots[owner])
        still_open = _settle(roots, still_open)
        stops = {int(roots[tag]): reason for tags, reason in self.stops for tag in _seen(tags)}
        return np.append(roots, UNTAGGED), stops, {int(roots[owner]) for owner, _ in still_open}


def _join(roots: IntArray, first: Sequence[int] | IntArray, second: Sequence[int] | IntArray) -> None:
    """Merge the units of tags at equal positions, in place."""
    while not np.array_equal(one := roots[first], other := roots[second]):
        np.minimum.at(roots, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(roots, further := roots[roots]):
            roots[:] = further


def _settle(roots: IntArray, ties: list[Tie]) -> list[Tie]:
    """Join each owner to its partners if these are one unit already, in place. Returns the open ties."""
    while True:
        ready = [tie for tie in ties if len({*roots[tie[1]]}) == 1]
        ties = [tie for tie in ties if len({*roots[tie[1]]}) > 1]
        if not ready:
            return ties
        _join(roots, [owner for owner, _ in ready], [partners[0] for _, partners in ready])


def finest(tags: Sequence[Tensor]) -> list[Tensor]:
    """The tag tensors, ordered by the number of distinct channels, largest first."""
    return sorted(tags, key=lambda item: -len(torch.unique(item)))


def _together(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    shape = (first + second).shape
    return first.expand(shape), second.expand(shape)


def _without_common(tags: Tensor) -> Tensor:
    """The tags (..., k, n) without channels shared by matrices that differ otherwise.

    For example, the rotary keys of latent attention stay when a head is removed.
    """
    matrices = tags.flatten(0, -3) if tags.ndim > 2 else ()
    seen = Counter(tag for channels in {frozenset(matrix.unique().tolist()) for matrix in matrices} for tag in channels)
    common = torch.tensor([tag for tag, count in seen.items() if count > 1], dtype=torch.long)
    return tags.masked_fill(torch.isin(tags, common), UNTAGGED)


def _pairs(first: Tensor, second: Tensor) -> Tensor:
    """Distinct (first, second) tags at equal positions, (2, n)."""
    first, second = _together(first, second)
    kept = (first >= 0) & (second >= 0) & (first != second)
    pairs: Tensor = torch.unique(torch.stack([first[kept], second[kept]]), dim=1)
    return pairs


def _seen(tags: Tensor) -> list[int]:
    return [tag for tag in torch.unique(tags).tolist() if tag >= 0]
