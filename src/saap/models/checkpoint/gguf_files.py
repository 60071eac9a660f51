"""Header of a GGUF file: fields and tensors, without the weights, and what it says that transformers does not read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np

from saap.core.errors import ModelError
from saap.models.checkpoint.safetensor_files import Shape

_TYPES = gguf.GGUFValueType
_VERSIONS = (2, 3)
# Field of a configuration by the key in the file, for sizes that transformers leaves at their defaults.
_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts")


class GgufField(NamedTuple):
    """A field of a file. kind: GGUFValueType. element: that of the entries of an array, else None."""

    value: Any
    kind: Any
    element: Any


class GgufTensor(NamedTuple):
    """A tensor of a file. shape: rows first. kind: GGMLQuantizationType. offset: of its bytes in the data section."""

    name: str
    shape: Shape
    kind: Any
    offset: int

    @property
    def nbytes(self) -> int:
        """Its bytes, without padding."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // int(block) * int(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """All of a file but its data. fields: by key, in order. places: where the numbers among them are in the file.

    fields_end, data_start: positions of the list of tensors and of the data. alignment: of each tensor's data.
    """

    fields: Mapping[str, GgufField]
    places: Mapping[str, slice]
    tensors: tuple[GgufTensor, ...]
    fields_end: int
    data_start: int
    alignment: int

    @property
    def architecture(self) -> str:
        """Name of the architecture, the prefix of its own keys."""
        return str(self.value(gguf.Keys.General.ARCHITECTURE) or "")

    def value(self, key: str) -> Any:
        """The value of a key; None if it is not there."""
        return self.fields[key].value if key in self.fields else None

    def own(self, key: str) -> Any:
        """The value of a key of the architecture, e.g. `expert_count`; None if it is not there."""
        return self.value(f"{self.architecture}.{key}")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def read_header(path: Path) -> GgufHeader:
    """The header of a file. Raises ModelError if it is damaged, or not a little-endian one of a supported version.

    gguf.GGUFReader keeps several arrays per token, three times the size of the largest tensor of a small model.
    """
    try:
        with path.open("rb") as file:
            return _header(file)
    except (ValueError, KeyError, ArithmeticError) as error:  # of an alignment of 0
        raise ModelError(f"{path} is damaged ({error})", "Download or copy the file again") from None


def _header(file: BinaryIO) -> GgufHeader:
    fields, places = dict[str, GgufField](), dict[str, slice]()
    magic, version = _values(file, _TYPES.UINT32, 2)
    if magic != gguf.GGUF_MAGIC or version not in _VERSIONS:
        raise ValueError(f"it is not a little-endian GGUF file of version {' or '.join(map(str, _VERSIONS))}")
    count, keys = _values(file, _TYPES.UINT64, 2)
    for _ in range(keys):
        (key,) = _values(file, _TYPES.STRING, 1)
        fields[key] = field = _field(file)
        if field.kind not in (_TYPES.STRING, _TYPES.ARRAY):
            places[key] = slice(file.tell() - _number(field.kind).itemsize, file.tell())
    fields_end = file.tell()
    tensors = tuple(_tensor(file) for _ in range(count))
    stated = fields.get(gguf.Keys.General.ALIGNMENT)
    alignment = gguf.GGUF_DEFAULT_ALIGNMENT if stated is None else int(stated.value)
    start = file.tell() + -file.tell() % alignment
    if start + max((one.offset + one.nbytes for one in tensors), default=0) > os.fstat(file.fileno()).st_size:
        raise ValueError("the file ends too early")
    return GgufHeader(
        fields=fields, places=places, tensors=tensors, fields_end=fields_end, data_start=start, alignment=alignment
    )


def bytes_per_token(path: Path) -> int:
    """Bytes read per token: all tensors except an embedding that is not tied to the output, and experts not chosen."""
    header = read_header(path)
    sizes = {tensor.name: tensor.nbytes for tensor in header.tensors}
    read = sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)
    count, chosen = (int(header.own(key) or 0) for key in ("expert_count", "expert_used_count"))
    stacks = sum(size for name, size in sizes.items() if "_exps." in name)
    return read - (stacks - stacks * chosen // count if count else 0)


def state_expert_sizes(config: Any, path: Path) -> None:
    """Set the sizes in a configuration that transformers made of the file, in place.

    Raises ModelError if the file is damaged or big-endian, or transformers reads it as a family without experts.
    """
    header = read_header(path)
    if not header.own("expert_count"):
        return
    if not any(hasattr(config, name) for name in _NUMBERS):
        raise ModelError(
            f"transformers does not read the experts of GGUF files of architecture {header.architecture} ({path.name})",
            "Use the folder with safetensors that the file was made from",
        )
    for key, name in _SIZES.items():
        value = header.own(key)
        if value is not None and hasattr(config, name):
            setattr(config, name, value)


def _field(file: BinaryIO) -> GgufField:
    kind = _TYPES(*_values(file, _TYPES.UINT32, 1))
    if kind is not _TYPES.ARRAY:
        return GgufField(_values(file, kind, 1)[0], kind, None)
    element = _TYPES(*_values(file, _TYPES.UINT32, 1))
    return GgufField(_values(file, element, *_values(file, _TYPES.UINT64, 1)), kind, element)


def _tensor(file: BinaryIO) -> GgufTensor:
    (name,) = _values(file, _TYPES.STRING, 1)
    shape = _values(file, _TYPES.UINT64, *_values(file, _TYPES.UINT32, 1))
    (kind,) = _values(file, _TYPES.UINT32, 1)
    (offset,) = _values(file, _TYPES.UINT64, 1)
    return GgufTensor(name, tuple(reversed(shape)), gguf.GGMLQuantizationType(kind), offset)


def _number(kind: Any) -> np.dtype[Any]:
    return np.dtype(gguf.GGUFReader.gguf_scalar_to_np[kind]).newbyteorder("<")  # type: ignore[no-any-return]


def _values(file: BinaryIO, kind: Any, count: int) -> list[Any]:
    if kind is _TYPES.STRING:
        return [_read(file, *_values(file, _TYPES.UINT64, 1)).decode("utf-8") for _ in range(count)]
    number = _number(kind)
    return list(np.frombuffer(_read(file, count * number.itemsize), number).tolist())


def _read(file: BinaryIO, count: int) -> bytes:
    if file.tell() + count > os.fstat(file.fileno()).st_size:
        raise ValueError("the file ends too early")
    return file.read(count)
