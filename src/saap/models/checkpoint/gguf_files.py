"""Header of a GGUF file: fields and tensors, without the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
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
    """All of a file but its data. fields: values by key. places: where the numbers among them are in the file.

    fields_end, data_start: positions of the list of tensors and of the data. alignment: of each tensor's data.
    """

    fields: Mapping[str, Any]
    places: Mapping[str, slice]
    tensors: tuple[GgufTensor, ...]
    fields_end: int
    data_start: int
    alignment: int

    @property
    def architecture(self) -> str:
        """Name of the architecture, the prefix of its own keys."""
        return str(self.fields.get(gguf.Keys.General.ARCHITECTURE, ""))

    def own(self, key: str) -> Any:
        """The value of a key of the architecture, e.g. `expert_count`; None if it is not there."""
        return self.fields.get(f"{self.architecture}.{key}")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def read_header(path: Path) -> GgufHeader:
    """The header of a file. Raises ModelError if the file is damaged, as `read_fields` does ValueError."""
    try:
        with path.open("rb") as file:
            return _header(file)
    except (ValueError, KeyError) as error:
        raise ModelError(f"{path} is damaged ({error})", "Download or copy the file again") from None


def _header(file: BinaryIO) -> GgufHeader:
    fields, places = dict[str, Any](), dict[str, slice]()
    count, keys = _counts(file)
    for _ in range(keys):
        key, value, kind, _ = _field(file)
        fields[key] = value
        if kind not in (_TYPES.STRING, _TYPES.ARRAY):
            places[key] = slice(file.tell() - _number(kind).itemsize, file.tell())
    fields_end = file.tell()
    tensors = tuple(_tensor(file) for _ in range(count))
    alignment = int(fields.get(gguf.Keys.General.ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT))
    start = file.tell() + -file.tell() % alignment
    if start + max((one.offset + one.nbytes for one in tensors), default=0) > os.fstat(file.fileno()).st_size:
        raise ValueError("the file ends too early")
    return GgufHeader(
        fields=fields, places=places, tensors=tensors, fields_end=fields_end, data_start=start, alignment=alignment
    )


def read_fields(path: Path) -> Iterator[tuple[str, Any, Any, Any]]:
    """Key, value, GGUFValueType, and the type of array entries (else None), in the order of the file.

    gguf.GGUFReader keeps several arrays per token, three times the size of the largest tensor of a small model. Raises
    ValueError if it is not a little-endian GGUF file of a supported version.
    """
    with path.open("rb") as file:
        _, fields = _counts(file)
        for _ in range(fields):
            yield _field(file)


def read_tensors(path: Path) -> tuple[GgufTensor, ...]:
    """The tensors of a file, without their data. Raises ModelError as `read_header` does."""
    return read_header(path).tensors


def bytes_per_token(path: Path) -> int:
    """Bytes read per token: all tensors except an embedding that is not tied to the output."""
    sizes = {tensor.name: tensor.nbytes for tensor in read_tensors(path)}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)


def _counts(file: BinaryIO) -> list[int]:
    """Numbers of tensors and of fields."""
    magic, version = _values(file, _TYPES.UINT32, 2)
    if magic != gguf.GGUF_MAGIC or version not in _VERSIONS:
        raise ValueError(f"it is not a little-endian GGUF file of version {' or '.join(map(str, _VERSIONS))}")
    return _values(file, _TYPES.UINT64, 2)


def _field(file: BinaryIO) -> tuple[str, Any, Any, Any]:
    (key,) = _values(file, _TYPES.STRING, 1)
    kind = _TYPES(*_values(file, _TYPES.UINT32, 1))
    if kind is not _TYPES.ARRAY:
        return key, *_values(file, kind, 1), kind, None
    element = _TYPES(*_values(file, _TYPES.UINT32, 1))
    return key, _values(file, element, *_values(file, _TYPES.UINT64, 1)), kind, element


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
