"""From the groups of the traced blocks to those of all blocks, by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from saap.core.errors import UnsupportedModelError
from saap.core.records import CoupledGroup, Refusal, Role
from saap.discovery.groups import TracedGroup
from saap.discovery.reduce import ReducedModel

HIDDEN_NAME = "hidden"


@dataclass(frozen=True, slots=True)
class Naming:
    """How the traced copy's names lead to the model's.

    blocks: paths of the model's blocks. kinds: indices of the blocks of each kind. copy: the traced model.
    """

    blocks: tuple[str, ...]
    kinds: tuple[tuple[int, ...], ...]
    copy: ReducedModel

    def traced_path(self, index: int) -> str:
        """Path in the copy of the model's block `index`, which must be among the traced ones."""
        return self.copy.blocks[self.copy.kept.index(index)]


def check_last_of_each_kind(groups: Sequence[TracedGroup], naming: Naming) -> None:
    """Raise UnsupportedModelError unless first and last block of each kind have the same groups."""
    for kind in naming.kinds:
        first, last = (naming.traced_path(index) for index in (kind[0], kind[-1]))
        expected = [_moved(group, first, last) for group in groups if group.block == first]
        if expected != [group for group in groups if group.block == last]:
            raise UnsupportedModelError(
                f"{naming.blocks[kind[0]]} and {naming.blocks[kind[-1]]} look alike but couple channels differently",
                "Give the blocks an attribute that tells their kinds apart",
            )


def with_hidden_checked(groups: Sequence[TracedGroup], naming: Naming) -> list[TracedGroup]:
    """Refuse hidden channels that meet first and last block of a kind in different places."""

    def places(group: TracedGroup, index: int) -> list[tuple[str, int, int]]:
        path = naming.traced_path(index) + "."
        inside = [member for member in group.members if member.tensor.startswith(path)]
        return [(member.tensor[len(path) :], member.axis, member.offset) for member in inside]

    def agrees(group: TracedGroup) -> bool:
        return all(places(group, kind[0]) == places(group, kind[-1]) for kind in naming.kinds)

    reason = "it meets blocks that look alike in different places"
    return [group if group.block is not None or agrees(group) else group.refuse(reason) for group in groups]


def everywhere(checked: Sequence[TracedGroup], naming: Naming, order: Sequence[str]) -> list[CoupledGroup | Refusal]:
    """The groups of every block in the order of the layers, and the hidden group.

    checked: groups of the first block of each kind and the hidden one. order: names of the model's parameters.
    """
    found: list[CoupledGroup | Refusal] = []
    kind_of = {index: kind for kind in naming.kinds for index in kind}
    for index, path in enumerate(naming.blocks):
        first = naming.traced_path(kind_of[index][0])
        here = [group for group in checked if group.block == first]
        counts = Counter(group.role for group in here if group.label is None)
        seen: Counter[Role] = Counter()
        for group in here:
            suffix = f".{seen[group.role]}" if counts[group.role] > 1 else ""
            seen[group.role] += group.label is None
            found += _in_block(_moved(group, first, path), index, f"layers.{index}.{group.role}{suffix}")
    found += [_hidden(group, naming, order) for group in checked if group.block is None]
    return found


def _in_block(group: TracedGroup, index: int, name: str) -> list[CoupledGroup | Refusal]:
    """The group in one block, or one group for each of the matrices or KV groups that it lies in."""
    if group.refusal is not None:
        return [Refusal(name=group.label or name, reason=group.refusal)]
    found = CoupledGroup(
        layer=index,
        role=group.role,
        name=name,
        units=group.units,
        members=group.members,
        attributes=group.attributes,
        scaled_norms=group.scaled_norms,
        sliced_arguments=group.sliced_arguments,
        least=group.least,
    )
    if group.shares:
        each = len(found.members) // group.shares
        shared = [found.members[first : first + each] for first in range(0, len(found.members), each)]
        return [replace(found, name=f"{name}.{n}", bundle=name, members=own) for n, own in enumerate(shared)]
    parts = [tuple(replace(member, part=part) for member in found.members) for part in range(group.parts)]
    bundle = [replace(found, name=f"{name}.expert.{n}", bundle=name, members=own) for n, own in enumerate(parts)]
    return [*bundle] if group.parts else [found]


def _hidden(group: TracedGroup, naming: Naming, order: Sequence[str]) -> CoupledGroup | Refusal:
    if group.refusal is not None:
        return Refusal(name=HIDDEN_NAME, reason=group.refusal)
    places = {name: place for place, name in enumerate(order)}
    members = dict.fromkeys(
        replace(member, tensor=name) for member in group.members for name in _all_paths([member.tensor], naming)
    )
    return CoupledGroup(
        layer=-1,
        role=Role.HIDDEN,
        name=HIDDEN_NAME,
        units=group.units,
        members=tuple(sorted(members, key=lambda member: places[member.tensor])),
        attributes=tuple(
            replace(found, module=path) for found in group.attributes for path in _all_paths([found.module], naming)
        ),
        scaled_norms=tuple(dict.fromkeys(_all_paths(group.scaled_norms, naming))),
    )


def _all_paths(names: Iterable[str], naming: Naming) -> list[str]:
    """The names in the model that the copy's names stand for: one for each block of the kind."""
    found: list[str] = []
    for name in names:
        owner = next((path for path in naming.copy.blocks if name.startswith(path + ".")), None)
        if owner is None:
            found.append(name)
            continue
        index = naming.copy.kept[naming.copy.blocks.index(owner)]
        kind = next(kind for kind in naming.kinds if index in kind)
        found += [_renamed(name, owner, naming.blocks[other]) for other in kind]
    return found


def _moved(group: TracedGroup, old: str, new: str) -> TracedGroup:
    return replace(
        group,
        block=new,
        members=tuple(replace(member, tensor=_renamed(member.tensor, old, new)) for member in group.members),
        scaled_norms=tuple(_renamed(norm, old, new) for norm in group.scaled_norms),
        attributes=tuple(replace(found, module=_renamed(found.module, old, new)) for found in group.attributes),
        sliced_arguments=tuple(
            replace(found, module=_renamed(found.module, old, new)) for found in group.sliced_arguments
        ),
        refusal=None if group.refusal is None else re.sub(re.escape(old) + r"(?!\d)", new, group.refusal),
        label=None if group.label is None else _renamed(group.label, old, new),
    )


def _renamed(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name == old or name.startswith(old + ".") else name
