"""The key-value part of a GGUF file, read in little memory.

gguf.GGUFReader keeps several arrays for each token, three times the size of the largest tensor of a small model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

_TYPES = gguf.GGUFValueType
_VERSIONS = (2, 3)


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
        magic, version = _values(file, _TYPES.UINT32, 2)
        _, count = _values(file, _TYPES.UINT64, 2)
        if magic != gguf.GGUF_MAGIC or version not in _VERSIONS:
            raise ValueError(f"{path} is no GGUF file of version {' or '.join(map(str, _VERSIONS))}")
        for _ in range(count):
            (key,) = _values(file, _TYPES.STRING, 1)
            kind = _TYPES(*_values(file, _TYPES.UINT32, 1))
            if kind is _TYPES.ARRAY:
                element = _TYPES(*_values(file, _TYPES.UINT32, 1))
                yield Field(key, _values(file, element, *_values(file, _TYPES.UINT64, 1)), kind, element)
            else:
                (value,) = _values(file, kind, 1)
                yield Field(key, value, kind)


def _values(file: BinaryIO, kind: Any, count: int) -> list[Any]:
    if kind is _TYPES.STRING:
        return [_bytes(file, *_values(file, _TYPES.UINT64, 1)).decode("utf-8") for _ in range(count)]
    number = np.dtype(gguf.GGUFReader.gguf_scalar_to_np[kind]).newbyteorder("<")
    return list(np.frombuffer(_bytes(file, count * number.itemsize), number).tolist())


def _bytes(file: BinaryIO, count: int) -> bytes:
    if file.tell() + count > os.fstat(file.fileno()).st_size:
        raise ValueError("the file ends too early")
    return file.read(count)
