"""Discovery of coupled groups: trace a copy with one block of each kind, then repeat its groups for all blocks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import nn

from saap.core.errors import UnsupportedModelError
from saap.core.records import ModelGraph, ModelRef, Refusal
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

    model: forward(input_ids) returns the logits; it is not changed. ref: identity of the weights, computed from the
    model if None. One block of each kind is traced, and its groups are repeated by name in all others. The last block
    of each kind is traced too and must agree. finer_heads: also return the query heads inside each KV group, which
    share their tensors with it. Unsupported parts are listed in `refused`. Raises UnsupportedModelError if nothing can
    be pruned, or the forward cannot be traced.
    """
    return of_structure(model, ref or model_ref(model, type(model).__name__), finer_heads=finer_heads)


def of_structure(model: nn.Module, ref: ModelRef, *, finer_heads: bool) -> ModelGraph:
    """Result of `discover`; it depends on modules, shapes and configuration, not on the weights."""
    blocks = find_blocks(model)
    require_own_weights(model, blocks)
    kinds = kinds_of(model, blocks)
    ends = sorted({index for kind in kinds for index in (kind[0], kind[-1])})
    for kept in (ends, list(range(len(blocks)))):  # some forwards need every block
        copied = with_blocks(model, blocks, kept)
        try:
            traced = trace(copied)
            break
        except UnsupportedModelError:
            if len(kept) == len(blocks):
                raise
    computing = {holder(blocks, path) for path in traced.modules}
    idle = [blocks[index] for place, index in enumerate(kept) if place not in computing]
    if idle:
        raise UnsupportedModelError(
            f"The forward of {type(model).__name__} does not pass through {', '.join(idle)}",
            "Call the decoder blocks as modules, in one nn.ModuleList",
        )
    repeats = _Repeats(blocks, [(kept.index(kind[0]), kept.index(kind[-1]), kind) for kind in kinds])
    found = Grouping(traced, blocks[: len(kept)]).groups()
    if finer_heads:
        found += [finer for group in found if (finer := query_heads(group)) is not None]
    found = repeats.agreeing(found)
    numbers = [number for number, group in enumerate(found) if group.layer in {-1, *repeats.firsts}]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    results = repeats.everywhere(checked(copied, blocks[: len(kept)], found, numbers), list(shapes))
    groups = tuple(each for group in results if not group.refusal for each in group.settled())
    refused = tuple(Refusal(name=group.name, reason=group.refusal) for group in results if group.refusal)
    if not groups:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in refused[:3]) or "no coupled channels were found"
        raise UnsupportedModelError(
            f"Nothing of {type(model).__name__} can be pruned ({reasons})",
            "Use a model whose blocks are made of operations that discovery knows",
        )
    graph = ModelGraph(model=ref, blocks=blocks, groups=groups, shapes=shapes, refused=refused)
    config, pinned = config_fields(model, graph)
    return replace(graph, config_fields=config, pinned_fields=pinned)


class _Repeats:
    """Expansion of the groups of the copy to those of the model, by name.

    blocks: paths of the model's blocks; the copy uses the first of these. kinds: for each kind, the positions of its
    first and last block in the copy, and the indices of its blocks in the model.
    """

    def __init__(self, blocks: Sequence[str], kinds: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        self.blocks, self.kinds = blocks, kinds
        first_of = {index: first for first, _, kind in kinds for index in kind}
        self.firsts = [first_of[index] for index in range(len(blocks))]

    def agreeing(self, groups: list[TracedGroup]) -> list[TracedGroup]:
        """The groups; hidden ones that differ between the first and last block of a kind are rejected.

        Raises UnsupportedModelError unless first and last block of each kind have the same groups.
        """
        for first, last, kind in self.kinds:
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
                    groups[number] = group.refuse("it has different positions in blocks that look alike")
        return groups

    def everywhere(self, groups: Sequence[TracedGroup], order: Sequence[str]) -> list[TracedGroup]:
        """The groups of every block in the order of the layers, and the hidden group, with their names.

        groups: those of the first block of each kind, and the hidden group. order: names of the model's parameters.
        """
        found: list[TracedGroup] = []
        for index, (path, first) in enumerate(zip(self.blocks, self.firsts, strict=True)):
            here = [_moved(group, self.blocks[first], path) for group in groups if group.layer == first]
            counts = Counter(group.role for group in here if not group.label)
            numbers = {role: iter(range(count)) for role, count in counts.items()}
            for group in here:
                name = group.label or f"layers.{index}.{group.role}"
                if not group.label and counts[group.role] > 1:
                    name += f".{next(numbers[group.role])}"
                found.append(replace(group, name=name, layer=index))
        places = {name: place for place, name in enumerate(order)}
        for group in (group for group in groups if group.layer < 0):
            members = dict.fromkeys(self._repeated(group.members, lambda member: member.tensor))
            spread = replace(
                group,
                name="hidden",
                members=tuple(sorted(members, key=lambda member: places[member.tensor])),
                attributes=tuple(self._repeated(group.attributes, lambda attribute: attribute.module)),
                scaled_norms=tuple(dict.fromkeys(self._repeated(group.scaled_norms, str))),
            )
            found.append(spread)
        return found

    def _repeated(self, items: Sequence[T], name: Callable[[T], str]) -> Iterator[T]:
        """Items of the copy, repeated in every block of the same kind."""
        for item in items:
            place = holder(self.blocks, name(item))
            kind = next((kind for *ends, kind in self.kinds if place in ends), ())
            yield from [_moved(item, self.blocks[place], self.blocks[index]) for index in kind] or [item]


def _moved(item: T, old: str, new: str) -> T:
    """A record with the module path `old` replaced by `new` in all names and texts."""
    moved: Any = item
    if type(moved) is str:
        moved = re.sub(rf"(?<![\w.]){re.escape(old)}(?!\w)", new, moved)
    elif isinstance(moved, tuple):
        moved = tuple(_moved(each, old, new) for each in moved)
    elif is_dataclass(moved):
        moved = replace(moved, **{f.name: _moved(getattr(moved, f.name), old, new) for f in fields(moved)})  # type: ignore[type-var]
    return moved  # type: ignore[no-any-return]
