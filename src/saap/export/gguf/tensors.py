"""The tensors of a GGUF file, and those of transformers that each of them holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import gguf

from saap.export.gguf.architectures import Architecture
from saap.models.checkpoint.safetensor_files import Shape

_EXPERT = re.compile(r"experts\.(\d+)\.")
_INPUT = re.compile(r"\.[qkv]_proj\.")
_SUFFIXES = (".weight", ".bias")
_COMMON = ("gate_up_proj", "input_linear")  # gate and up of all experts in one tensor


class Part(NamedTuple):
    """How a tensor is cut out of one that transformers has for all experts.

    rows: of axis 1. transposed: axes 1 and 2 are swapped before.
    """

    rows: slice = slice(None)
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor of the file.

    sources: the tensors of transformers that it holds, one after the other; none: zeros, or `values`. kind: its type in
    the file. head_rows: rows per head to interleave, 0: none. offset: added to the values, which are then multiplied by
    `factor`. packed: its quantised blocks exist and are copied. part: of the sources; None: all.
    """

    name: str
    sources: tuple[str, ...]
    shape: Shape
    kind: Any
    head_rows: int = 0
    offset: float = 0.0
    factor: float = 1.0
    packed: bool = False
    part: Part | None = None
    values: tuple[float, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file, without padding."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // int(block) * int(size)

    @property
    def title(self) -> str:
        """Its name in messages."""
        return ", ".join(self.sources) or self.name


class Group(NamedTuple):
    """Sources of one tensor of the file, its shape, and the part of the sources that it has."""

    sources: tuple[str, ...]
    shape: Shape
    part: Part | None = None


class Names:
    """Names of tensors in llama.cpp by those in transformers, from the package gguf."""

    def __init__(self, architecture: str, blocks: int) -> None:
        known = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        self._names = gguf.get_tensor_name_map(known, blocks)

    def of(self, source: str) -> str | None:
        """The name of a tensor, the same for every expert; None if llama.cpp has none."""
        name = re.sub(r"_bias$", ".bias", _EXPERT.sub("experts.", source))
        if not name.endswith(_SUFFIXES):
            name = f"{name}.weight"
        found: str | None = self._names.get_name(name, _SUFFIXES)
        return found or self._names.get_name(name.replace("block_sparse_moe.", "mlp."), _SUFFIXES)


def grouped(
    shapes: Mapping[str, Shape], names: Names, family: Architecture, *, fused_inputs: bool
) -> tuple[dict[str, list[Group]], list[str]]:
    """The parts of each tensor of the file in their order, and the tensors for which it has no place.

    fused_inputs: queries, keys and values are one tensor.
    """
    found: dict[str, list[Group]] = {}
    unknown: list[str] = []
    for source, shape in shapes.items():
        for alias, group in _parts(source, shape, family):
            name = names.of(_INPUT.sub(".qkv_proj.", alias) if fused_inputs else alias)
            if name is None:
                unknown.append(source)
                continue
            found.setdefault(name, []).append(group)
    return {name: sorted(groups, key=lambda group: _place(group.sources[0])) for name, groups in found.items()}, unknown


def joined(groups: Sequence[Group]) -> Group:
    """Rows or experts of all. Raises ValueError if their other sizes differ."""
    (others,) = {group.shape[1:] for group in groups}
    sources = tuple(source for group in groups for source in group.sources)
    return Group(sources, (sum(group.shape[0] for group in groups), *others), groups[0].part)


def _place(source: str) -> tuple[int, int]:
    """Sort key: experts by number; queries before keys before values."""
    expert = _EXPERT.search(source)
    projection = next((place for place, one in enumerate("qkv") if f".{one}_proj." in source), 0)
    return int(expert[1]) if expert else 0, projection


def _parts(source: str, shape: Shape, family: Architecture) -> list[tuple[str, Group]]:
    """Names that a source has in transformers' oldest form, in which every matrix is a tensor, and what it then has."""
    if _EXPERT.search(source):
        return [(source, Group((source,), (1, *shape)))]
    turned = family.experts is not None and family.experts.interleaved and len(shape) == 3
    if turned:
        shape = (shape[0], shape[2], shape[1])
    common = next((name for name in _COMMON if name in source), None)
    if common is None or family.experts is None:
        return [(source, Group((source,), shape, Part(transposed=True) if turned else None))]
    half = shape[1] // 2
    both = (slice(0, half), slice(half, None))
    if family.experts.interleaved:
        both = (slice(0, None, 2), slice(1, None, 2))
    names = (re.sub(rf"(experts\.)?{common}(\.weight)?", f"experts.{one}_proj", source) for one in ("gate", "up"))
    return [
        (name, Group((source,), (shape[0], half, *shape[2:]), Part(rows, turned)))
        for name, rows in zip(names, both, strict=True)
    ]
