"""Fields and tensors of a GGUF file, without its weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from saap.models.checkpoint.safetensor_files import Shape

_TYPES = gguf.GGUFValueType
_VERSIONS = (2, 3)


def read_fields(path: Path) -> Iterator[tuple[str, Any, Any, Any]]:
    """Key, value, GGUFValueType, and the type of array entries (else None), in the order of the file.

    gguf.GGUFReader keeps several arrays per token, three times the size of the largest tensor of a small model. Raises
    ValueError if it is not a little-endian GGUF file of a supported version.
    """
    with path.open("rb") as file:
        _, fields = _counts(file)
        for _ in range(fields):
            yield _field(file)


def read_tensors(path: Path) -> Iterator[tuple[str, Shape, Any]]:
    """Name, shape (rows first) and GGMLQuantizationType of every tensor. Raises ValueError as `read_fields` does."""
    with path.open("rb") as file:
        tensors, fields = _counts(file)
        for _ in range(fields):
            _field(file)
        for _ in range(tensors):
            (name,) = _values(file, _TYPES.STRING, 1)
            shape = _values(file, _TYPES.UINT64, *_values(file, _TYPES.UINT32, 1))
            kind, _, _ = _values(file, _TYPES.UINT32, 3)  # the last two are the offset
            yield name, tuple(reversed(shape)), gguf.GGMLQuantizationType(kind)


def bytes_per_token(path: Path) -> int:
    """Bytes read per token: all tensors except an embedding that is not tied to the output."""
    sizes = {}
    for name, shape, kind in read_tensors(path):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        sizes[name] = prod(shape) // int(block) * int(size)
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)


def _counts(file: BinaryIO) -> list[int]:
    """Numbers of tensors and of fields."""
    magic, version = _values(file, _TYPES.UINT32, 2)
    if magic != gguf.GGUF_MAGIC or version not in _VERSIONS:
        raise ValueError(f"{file.name} is not a GGUF file of version {' or '.join(map(str, _VERSIONS))}")
    return _values(file, _TYPES.UINT64, 2)


def _field(file: BinaryIO) -> tuple[str, Any, Any, Any]:
    (key,) = _values(file, _TYPES.STRING, 1)
    kind = _TYPES(*_values(file, _TYPES.UINT32, 1))
    if kind is not _TYPES.ARRAY:
        return key, *_values(file, kind, 1), kind, None
    element = _TYPES(*_values(file, _TYPES.UINT32, 1))
    return key, _values(file, element, *_values(file, _TYPES.UINT64, 1)), kind, element


def _values(file: BinaryIO, kind: Any, count: int) -> list[Any]:
    if kind is _TYPES.STRING:
        return [_read(file, *_values(file, _TYPES.UINT64, 1)).decode("utf-8") for _ in range(count)]
    number = np.dtype(gguf.GGUFReader.gguf_scalar_to_np[kind]).newbyteorder("<")
    return list(np.frombuffer(_read(file, count * number.itemsize), number).tolist())


def _read(file: BinaryIO, count: int) -> bytes:
    if file.tell() + count > os.fstat(file.fileno()).st_size:
        raise ValueError("the file ends too early")
    return file.read(count)
