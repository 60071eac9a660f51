"""From a model to its graph of coupled groups: a copy with one block of each kind is traced, its groups repeated."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import nn

from saap.core.errors import UnsupportedModelError
from saap.core.records import CoupledGroup, ModelGraph, ModelRef, Refusal
from saap.discovery.blocks import find_blocks, holder, kinds_of, require_own_weights, with_blocks
from saap.discovery.groups import Grouping, TracedGroup, query_heads
from saap.discovery.removal import checked
from saap.discovery.trace import trace
from saap.models.checkpoint.stock_config import config_fields
from saap.models.loading.pretrained import model_ref, quiet_transformers

T = TypeVar("T")


@quiet_transformers()
def discover(model: nn.Module, ref: ModelRef | None = None, *, finer_heads: bool = False) -> ModelGraph:
    """Find the coupled groups of a causal language model: FFN channels, KV groups, experts and hidden channels.

    model: forward(input_ids) gives the logits; it is only read. ref: which weights these are, made from the model if
    None. One block of each kind is traced and found again by name in all others; the last of each kind is traced too
    and must agree. finer_heads: also the query heads inside each KV group, which share their tensors with it.
    Parts that are not understood are in `refused`. Raises UnsupportedModelError if nothing can be
    pruned, or the forward cannot be traced.
    """
    ref = ref or model_ref(model, type(model).__name__)
    return of_structure(model, ref, finer_heads=finer_heads)


def of_structure(model: nn.Module, ref: ModelRef, *, finer_heads: bool) -> ModelGraph:
    """What `discover` finds; modules, shapes and configuration decide it, the weights do not."""
    blocks = find_blocks(model)
    require_own_weights(model, blocks)
    kinds = kinds_of(model, blocks)
    kept = sorted({index for kind in kinds for index in (kind[0], kind[-1])})
    try:
        traced = trace(with_blocks(model, blocks, kept))
    except UnsupportedModelError:  # some forwards need every block
        if len(kept) == len(blocks):
            raise
        kept = list(range(len(blocks)))
        traced = trace(with_blocks(model, blocks, kept))
    computing = {holder(blocks, path) for path in traced.modules}
    idle = [blocks[index] for place, index in enumerate(kept) if place not in computing]
    if idle:
        raise UnsupportedModelError(
            f"The forward of {type(model).__name__} does not pass through {', '.join(idle)}",
            "Call the decoder blocks as modules, in one nn.ModuleList",
        )
    repeats = _Repeats(blocks, kinds, kept)
    found = Grouping(traced, blocks[: len(kept)]).groups()
    if finer_heads:
        found += [finer for group in found if (finer := query_heads(group)) is not None]
    found = repeats.agreeing(found)
    firsts = {-1, *(first for first, _ in repeats.ends)}
    numbers = [number for number, group in enumerate(found) if group.layer in firsts]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    results = repeats.everywhere(checked(traced.model, blocks[: len(kept)], found, numbers), list(shapes))
    groups = tuple(item for item in results if isinstance(item, CoupledGroup))
    refused = tuple(item for item in results if isinstance(item, Refusal))
    if not groups:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in refused[:3]) or "no coupled channels were found"
        raise UnsupportedModelError(
            f"Nothing of {type(model).__name__} can be pruned ({reasons})",
            "Use a model whose blocks are made of operations that discovery knows",
        )
    graph = ModelGraph(model=ref, blocks=blocks, groups=groups, shapes=shapes, refused=refused)
    config, pinned = config_fields(model, graph)
    return replace(graph, config_fields=config, pinned_fields=pinned)


@dataclass(frozen=True, slots=True)
class _Repeats:
    """From the groups of the copy to those of the model, by name.

    blocks: paths of the model's blocks; the copy has the first of these. kinds: indices of the blocks of each kind.
    kept: which of the model's blocks the copy has.
    """

    blocks: Sequence[str]
    kinds: Sequence[Sequence[int]]
    kept: Sequence[int]

    @property
    def ends(self) -> list[tuple[int, int]]:
        """First and last block of each kind, by their places in the copy."""
        return [(self.kept.index(kind[0]), self.kept.index(kind[-1])) for kind in self.kinds]

    def agreeing(self, groups: list[TracedGroup]) -> list[TracedGroup]:
        """The groups; hidden ones are refused that meet first and last block of a kind in different places.

        Raises UnsupportedModelError unless first and last block of each kind have the same groups.
        """
        reason = "it meets blocks that look alike in different places"
        for kind, (first, last) in zip(self.kinds, self.ends, strict=True):
            old, new = self.blocks[first], self.blocks[last]
            expected = [replace(_moved(group, old, new), layer=last) for group in groups if group.layer == first]
            if expected != [group for group in groups if group.layer == last]:
                raise UnsupportedModelError(
                    f"{self.blocks[kind[0]]} and {self.blocks[kind[-1]]} look alike but couple channels differently",
                    "Give the blocks an attribute that tells their kinds apart",
                )
            for number, group in enumerate(groups):
                here, there = (
                    [m for m in group.members if holder(self.blocks, m.tensor) == at] for at in (first, last)
                )
                if group.layer < 0 and [_moved(member, old, new) for member in here] != there:
                    groups[number] = group.refuse(reason)
        return groups

    def everywhere(self, groups: Sequence[TracedGroup], order: Sequence[str]) -> list[CoupledGroup | Refusal]:
        """The groups of every block in the order of the layers, and the hidden group.

        groups: of the first block of each kind, and the hidden one. order: names of the model's parameters.
        """
        found: list[CoupledGroup | Refusal] = []
        places = {name: place for place, name in enumerate(order)}
        first_of = {index: first for kind, (first, _) in zip(self.kinds, self.ends, strict=True) for index in kind}
        for index, path in enumerate(self.blocks):
            first = first_of[index]
            here = [_moved(group, self.blocks[first], path) for group in groups if group.layer == first]
            counts = Counter(group.role for group in here if not group.label)
            numbers: Counter[str] = Counter()
            for group in here:
                number = f".{numbers[group.role]}" if counts[group.role] > 1 else ""
                numbers[group.role] += not group.label
                found += group.settled(group.label or f"layers.{index}.{group.role}{number}", index)
        for group in (group for group in groups if group.layer < 0):
            members = dict.fromkeys(self._repeated(group.members, lambda member: member.tensor))
            spread = replace(
                group,
                members=tuple(sorted(members, key=lambda member: places[member.tensor])),
                attributes=tuple(self._repeated(group.attributes, lambda attribute: attribute.module)),
                scaled_norms=tuple(dict.fromkeys(self._repeated(group.scaled_norms, str))),
            )
            found += spread.settled("hidden", -1)
        return found

    def _repeated(self, items: Sequence[T], name: Callable[[T], str]) -> Iterator[T]:
        """Items of the copy, in every block that the one which holds them stands for."""
        for item in items:
            place = holder(self.blocks, name(item))
            kind = next((kind for kind in self.kinds if place >= 0 and self.kept[place] in kind), [])
            yield from [_moved(item, self.blocks[place], self.blocks[index]) for index in kind] or [item]


def _moved(item: T, old: str, new: str) -> T:
    """A record with every name of what lies in the module `old`, in texts too, as if it lay in `new`."""
    moved: Any = item
    if type(moved) is str:
        moved = re.sub(rf"(?<![\w.]){re.escape(old)}(?!\w)", new, moved)
    elif isinstance(moved, tuple):
        moved = tuple(_moved(each, old, new) for each in moved)
    elif is_dataclass(moved):
        moved = replace(moved, **{f.name: _moved(getattr(moved, f.name), old, new) for f in fields(moved)})  # type: ignore[type-var]
    return moved  # type: ignore[no-any-return]
