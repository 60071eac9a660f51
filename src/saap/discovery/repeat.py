"""From the groups of the traced blocks to those of all blocks, by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from saap.core.errors import UnsupportedModelError
from saap.core.records import AxisSlice, CoupledGroup, Refusal, Role, UnitAttribute
from saap.discovery.groups import TracedGroup
from saap.discovery.reduce import ReducedModel

HIDDEN_NAME = "hidden"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A traced group with what physical removal needs, as found on a small instance."""

    group: TracedGroup
    attributes: tuple[UnitAttribute, ...] = ()
    sliced_arguments: tuple[str, ...] = ()


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
    return [
        group if group.block is not None or group.refusal or agrees(group) else replace(group, refusal=reason)
        for group in groups
    ]


def everywhere(checked: Sequence[Checked], naming: Naming, order: Sequence[str]) -> list[CoupledGroup | Refusal]:
    """The groups of every block in the order of the layers, and the hidden group.

    checked: groups of the first block of each kind and the hidden one. order: names of the model's parameters.
    """
    found: list[CoupledGroup | Refusal] = []
    kind_of = {index: kind for kind in naming.kinds for index in kind}
    for index, path in enumerate(naming.blocks):
        first = naming.traced_path(kind_of[index][0])
        here = [item for item in checked if item.group.block == first]
        counts = Counter(item.group.role for item in here if item.group.label is None)
        seen: Counter[Role] = Counter()
        for item in here:
            role = item.group.role
            suffix = f".{seen[role]}" if counts[role] > 1 else ""
            seen[role] += item.group.label is None
            found += _in_block(item, first, path, index, f"layers.{index}.{role}{suffix}")
    found += [_hidden(item, naming, order) for item in checked if item.group.block is None]
    return found


def _in_block(item: Checked, first: str, path: str, index: int, name: str) -> list[CoupledGroup | Refusal]:
    """The group as it lies in one block, or one group for each of the matrices or KV groups that it lies in."""
    group = _moved(item.group, first, path)
    if group.refusal is not None:
        return [Refusal(name=group.label or name, reason=group.refusal)]
    found = CoupledGroup(
        layer=index,
        role=group.role,
        name=name,
        units=group.units,
        members=group.members,
        attributes=tuple(replace(found, module=_renamed(found.module, first, path)) for found in item.attributes),
        scaled_norms=group.scaled_norms,
        sliced_arguments=tuple(_renamed(module, first, path) for module in item.sliced_arguments),
        least=group.least,
    )
    if group.shares:
        each = len(found.members) // group.shares
        return [
            replace(
                found, name=f"{name}.{share}", bundle=name, members=found.members[share * each : (share + 1) * each]
            )
            for share in range(group.shares)
        ]
    if not group.parts:
        return [found]
    return [
        replace(
            found,
            name=f"{name}.expert.{part}",
            bundle=name,
            members=tuple(replace(member, part=part) for member in found.members),
        )
        for part in range(group.parts)
    ]


def _hidden(item: Checked, naming: Naming, order: Sequence[str]) -> CoupledGroup | Refusal:
    group = item.group
    if group.refusal is not None:
        return Refusal(name=HIDDEN_NAME, reason=group.refusal)
    places = {name: place for place, name in enumerate(order)}
    members = {_key(member): member for member in _all_blocks(group.members, naming)}
    norms = dict.fromkeys(_all_paths(group.scaled_norms, naming))
    return CoupledGroup(
        layer=-1,
        role=Role.HIDDEN,
        name=HIDDEN_NAME,
        units=group.units,
        members=tuple(sorted(members.values(), key=lambda member: places[member.tensor])),
        attributes=tuple(
            replace(found, module=path) for found in item.attributes for path in _all_paths([found.module], naming)
        ),
        scaled_norms=tuple(norms),
    )


def _all_blocks(members: Iterable[AxisSlice], naming: Naming) -> list[AxisSlice]:
    return [replace(member, tensor=name) for member in members for name in _all_paths([member.tensor], naming)]


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
        refusal=None if group.refusal is None else re.sub(re.escape(old) + r"(?!\d)", new, group.refusal),
        label=None if group.label is None else _renamed(group.label, old, new),
    )


def _renamed(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name == old or name.startswith(old + ".") else name


def _key(member: AxisSlice) -> tuple[str, int, int]:
    return (member.tensor, member.axis, member.offset)
