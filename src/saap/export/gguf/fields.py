"""The key-value part of a GGUF file, read in little memory.

gguf.GGUFReader keeps several arrays for each token, three times the size of the largest tensor of a small model.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf

_TYPES = gguf.GGUFValueType
_VERSIONS = (2, 3)
_FORMATS = {
    _TYPES.UINT8: "<B", _TYPES.INT8: "<b", _TYPES.UINT16: "<H", _TYPES.INT16: "<h", _TYPES.UINT32: "<I",
    _TYPES.INT32: "<i", _TYPES.FLOAT32: "<f", _TYPES.BOOL: "<?", _TYPES.UINT64: "<Q", _TYPES.INT64: "<q",
    _TYPES.FLOAT64: "<d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Field:
    """One key of a file. kind: GGUFValueType of the value; element: of its entries where it is an array."""

    key: str
    value: Any
    kind: Any
    element: Any = None


def read_fields(path: Path) -> Iterator[Field]:
    """The fields of a file in order. Raises ValueError if it is no little-endian GGUF file of a known version."""
    with path.open("rb") as file:
        magic, version, _, count = struct.unpack("<IIQQ", _exactly(file, 24))
        if magic != gguf.GGUF_MAGIC or version not in _VERSIONS:
            raise ValueError(f"{path} is no GGUF file of version {' or '.join(map(str, _VERSIONS))}")
        for _ in range(count):
            key = _text(file)
            kind = _TYPES(_number(file, "<I"))
            element = None
            if kind is _TYPES.ARRAY:
                element = _TYPES(_number(file, "<I"))
                value = [_value(file, element) for _ in range(_number(file, "<Q"))]
            else:
                value = _value(file, kind)
            yield Field(key, value, kind, element)


def _value(file: BinaryIO, kind: Any) -> Any:
    return _text(file) if kind is _TYPES.STRING else _number(file, _FORMATS[kind])


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack(code, _exactly(file, struct.calcsize(code)))[0]


def _text(file: BinaryIO) -> str:
    return _exactly(file, _number(file, "<Q")).decode("utf-8")


def _exactly(file: BinaryIO, count: int) -> bytes:
    found = file.read(count)
    if len(found) < count:
        raise ValueError("the file ends too early")
    return found
