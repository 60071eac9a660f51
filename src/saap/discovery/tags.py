"""Channel tags: one integer per index of every parameter axis, and which of them must be removed together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saap.core.records import IntArray

UNTAGGED = -1


@dataclass(frozen=True, slots=True)
class ParameterTags:
    """A parameter of two or more axes, seen through transposes and slices: the tags of each axis."""

    axes: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter in its present form."""
        return tuple(len(axis) for axis in self.axes)

    def as_activation(self) -> Tensor:
        """Tags of the elements where the parameter is used like an activation: those of its last axis."""
        return self.axes[-1].expand(self.shape)


@dataclass(frozen=True, slots=True)
class Reduction:
    """A statistic over channels. kind: "rms", or the name of the operation. channels: (rows, channels) tags."""

    kind: str
    module: str
    channels: Tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice of the `count` greatest among channels (experts), by data. channels: (channels,) tags."""

    count: int
    channels: Tensor


@dataclass(frozen=True, slots=True)
class Units:
    """Which tags are removed together.

    roots: (tags,) the unit of each tag. stops: unit -> the operation that it went into and that has no rule. spread:
    unit -> that it has no place of its own, such as the weight of a norm that all heads share.
    """

    roots: IntArray
    stops: dict[int, str]
    spread: dict[int, str]

    def of(self, tags: Tensor | IntArray) -> IntArray:
        """The units of tags of any shape; UNTAGGED stays."""
        values = np.asarray(tags, np.int64)
        return np.where(values < 0, UNTAGGED, self.roots[values])


class TagSpace:
    """Issues the tags and collects what the walk over the graph learns about them."""

    def __init__(self) -> None:
        self.reductions: list[Reduction] = []
        self.choices: list[Choice] = []
        self._count = 0
        self._ties: list[Tensor] = []
        self._open: list[tuple[int, list[int]]] = []
        self._marks: dict[str, list[Tensor]] = {}
        self._stops: list[tuple[Tensor, str]] = []

    def fresh(self, size: int) -> Tensor:
        """New tags, (size,)."""
        self._count += size
        return torch.arange(self._count - size, self._count)

    def tie(self, first: Tensor, second: Tensor) -> None:
        """Channels at equal places of two broadcastable tag tensors are removed together."""
        self._ties.append(_pairs(first, second))

    def tie_shared(self, first: Tensor, second: Tensor) -> None:
        """As `tie`, but a tag that meets several others is tied only if these turn out to be one unit.

        Otherwise the weight of a norm that all heads share, or a scalar gate, would join everything.
        """
        pairs = _pairs(first, second)
        for side in (0, 1):
            values, counts = torch.unique(pairs[side], return_counts=True)
            shared = torch.isin(pairs[side], values[counts > 1])
            partners: dict[int, list[int]] = {}
            for owner, partner in zip(pairs[side][shared].tolist(), pairs[1 - side][shared].tolist(), strict=True):
                partners.setdefault(owner, []).append(partner)
            self._open += partners.items()
            pairs = pairs[:, ~shared]
        self._ties.append(pairs)

    def tie_along(self, tags: Tensor, dim: int) -> None:
        """All channels along `dim` are removed together."""
        size = tags.shape[dim]
        if size > 1:
            self.tie(tags.narrow(dim, 0, size - 1), tags.narrow(dim, 1, size - 1))

    def contract(self, first: Tensor, second: Tensor) -> Tensor:
        """Tags of first @ second, both activations: all channels that are summed over, and the result, become one unit.

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
        # The finer tags are kept, so that channels stay told apart in what follows.
        fine, coarse = finest([rows, columns])
        return torch.where(fine < 0, coarse, fine)

    def mark(self, name: str, tags: Tensor) -> None:
        """Remember that these channels were seen in the part that `name` says."""
        self._marks.setdefault(name, []).append(_seen(tags))

    def marked(self, *names: str) -> IntArray:
        """Tags marked with any of the names, ascending."""
        found = [tags for name in names for tags in self._marks.get(name, [])]
        return np.asarray(torch.unique(torch.cat([torch.empty(0, dtype=torch.long), *found])))

    def stop(self, tags: Tensor, reason: str) -> None:
        """These channels went into something that is not understood."""
        self._stops.append((_seen(tags), reason))

    def units(self) -> Units:
        """Resolve all ties."""
        forest = _Forest(self._count)
        for pairs in self._ties:
            for first, second in pairs.T.tolist():
                forest.unite(first, second)
        still_open = _settled(forest, self._open)
        # What a head's channel multiplies in several places (a gate on the output of grouped heads) is the head's.
        heads = {forest.root(tag) for tag in np.intersect1d(self.marked("softmax"), self.marked("product")).tolist()}
        for owner, partners in still_open:
            if forest.root(owner) in heads:
                for partner in partners:
                    forest.unite(owner, partner)
                heads.add(forest.root(owner))
        still_open = _settled(forest, still_open)
        roots = np.array([forest.root(tag) for tag in range(self._count)], dtype=np.int64)
        stops = {int(roots[tag]): reason for tags, reason in self._stops for tag in tags.tolist()}
        spread = {int(roots[owner]): "one channel of it acts on several units" for owner, _ in still_open}
        return Units(roots, stops, spread)


class _Forest:
    """Union-find with path halving."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def root(self, item: int) -> int:
        parents = self._parents
        while parents[item] != item:
            parents[item] = parents[parents[item]]
            item = parents[item]
        return item

    def unite(self, first: int, second: int) -> None:
        one, other = self.root(first), self.root(second)
        self._parents[max(one, other)] = min(one, other)


def _settled(forest: _Forest, ties: list[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    """Join each owner to its partners where these are one unit already; the ties that stay open."""
    while True:
        remaining = []
        for owner, partners in ties:
            if len({forest.root(partner) for partner in partners}) == 1:
                forest.unite(owner, partners[0])
            else:
                remaining.append((owner, partners))
        if len(remaining) == len(ties):
            return ties
        ties = remaining


def finest(tags: Sequence[Tensor]) -> list[Tensor]:
    """The tag tensors, the one that tells most channels apart first."""
    return sorted(tags, key=lambda item: -len(torch.unique(item)))


def _together(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    shape = (first + second).shape
    return first.expand(shape), second.expand(shape)


def _without_common(tags: Tensor) -> Tensor:
    """The tags without channels that matrices have in common which differ otherwise: these stay when a head is removed.

    Such are the rotary keys of latent attention, the same for all heads. tags: (..., k, n).
    """
    matrices = tags.flatten(0, -3) if tags.ndim > 2 else ()
    seen = Counter(tag for channels in {frozenset(matrix.unique().tolist()) for matrix in matrices} for tag in channels)
    common = torch.tensor([tag for tag, count in seen.items() if count > 1], dtype=torch.long)
    return tags.masked_fill(torch.isin(tags, common), UNTAGGED)


def _pairs(first: Tensor, second: Tensor) -> Tensor:
    """Distinct (first, second) tags at equal places, (2, n)."""
    first, second = _together(first, second)
    kept = (first >= 0) & (second >= 0) & (first != second)
    keys = torch.unique(first[kept] << 32 | second[kept])
    return torch.stack([keys >> 32, keys & 0xFFFFFFFF])


def _seen(tags: Tensor) -> Tensor:
    seen: Tensor = torch.unique(tags)
    return seen[seen >= 0]
