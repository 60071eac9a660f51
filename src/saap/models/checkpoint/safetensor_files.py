"""Stored weights: checks of safetensors files by their headers, and reading and writing tensor by tensor."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import torch
from torch import nn

from saap.core.errors import ModelError
from saap.core.files import whole_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_HEADER_LIMIT = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "C64": torch.complex64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
Shape = tuple[int, ...]
_DOWNLOAD_AGAIN = "Download or copy the file again"


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder. Raises ModelError if there are none, or not all, or others only."""
    index = folder / INDEX_NAME
    if index.exists():
        return _indexed_files(folder, index)
    if (folder / SINGLE_NAME).is_file():
        return (folder / SINGLE_NAME,)
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} holds its weights only in the pickle format ({', '.join(pickled[:3])}), which can run code",
            "Convert them to safetensors, e.g. with save_pretrained in a place that trusts them",
        )
    raise ModelError(f"{folder} has no {SINGLE_NAME}", "Give a folder with config.json and safetensors weights")


def _indexed_files(folder: Path, index: Path) -> tuple[Path, ...]:
    try:
        names = list(dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{index} is no index of safetensors files", _DOWNLOAD_AGAIN) from None
    if not names:
        raise ModelError(f"{index} names no files", _DOWNLOAD_AGAIN)
    for name in names:
        if not isinstance(name, str) or name != PurePosixPath(name).name or name != PureWindowsPath(name).name:
            raise ModelError(
                f"{index} points outside its folder ({name!r})", "Do not use this checkpoint, or correct its index"
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}, named in {index.name}", "Download the missing files")
    return tuple(folder / name for name in sorted(names))


def stored_dtype(files: tuple[Path, ...]) -> torch.dtype:
    """The dtype of most values in the files. Raises ModelError, naming the file, if one is damaged or truncated."""
    bytes_of: Counter[torch.dtype] = Counter()
    for file in files:
        for entry in read_header(file).values():
            bytes_of[_DTYPES[entry["dtype"]]] += prod(entry["shape"])
    floating = [dtype for dtype, _ in bytes_of.most_common() if dtype.is_floating_point]
    return floating[0] if floating else torch.float32


def read_header(file: Path) -> dict[str, Any]:
    """Entries of the tensors in a safetensors file: dtype, shape, data_offsets.

    Raises ModelError if the header cannot be read, or the file is shorter or longer than the header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ModelError(f"{file} is truncated or no safetensors file", _DOWNLOAD_AGAIN)
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        ends = [_checked_end(entry) for entry in header.values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{file} has a damaged header", _DOWNLOAD_AGAIN) from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelError(f"{file} has {size} bytes, but its header says {expected}", _DOWNLOAD_AGAIN)
    return dict(header)


def _checked_end(entry: dict[str, Any]) -> int:
    first, end = entry["data_offsets"]
    if end - first != prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize:
        raise ValueError("size and offsets disagree")
    return int(end)


class StoredTensors(Protocol):
    """Where an export takes its weights from. shapes: of every tensor by its name in transformers."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Sizes of all tensors."""

    def rows(self, name: str, rows: range) -> torch.Tensor:
        """Consecutive rows of a tensor along its first axis, on the CPU, in the stored dtype."""


class TensorReader:
    """Reads single tensors of safetensors files into memory of their own, so that no file stays mapped."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in files:
            header = read_header(file)
            with file.open("rb") as stream:
                data = 8 + int.from_bytes(stream.read(8), "little")
            for name, entry in header.items():
                self._places[name] = (file, data, entry)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Sizes of all tensors, from the headers."""
        return {name: tuple(entry["shape"]) for name, (_, _, entry) in self._places.items()}

    def shape(self, name: str) -> Shape | None:
        """Shape of a tensor, None if there is none of that name."""
        return tuple(self._places[name][2]["shape"]) if name in self._places else None

    def names(self, module: str) -> frozenset[str]:
        """Names of the tensors of one module, without its path."""
        return frozenset(name.removeprefix(f"{module}.") for name in self._places if name.startswith(f"{module}."))

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, on the CPU in its stored type. Raises ModelError if it is missing or cut off."""
        return self._from_bytes(name, None)

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a tensor along its first axis, in the given order. Raises ModelError as `read` does."""
        return self._from_bytes(name, rows)

    def _from_bytes(self, name: str, rows: Sequence[int] | None) -> torch.Tensor:
        if name not in self._places:
            raise ModelError(f"The checkpoint lacks the weight {name}", "Use a complete checkpoint")
        file, data, entry = self._places[name]
        shape, (first, end) = tuple(entry["shape"]), entry["data_offsets"]
        spans = [(first, end)]
        if rows is not None:
            count, size = shape[0], (end - first) // max(1, shape[0])
            wrong = [row for row in rows if not 0 <= row < count]
            if wrong:
                raise IndexError(f"{name} has {count} rows, not one of number {wrong[0]}")
            runs = [(rows[0], rows[-1] + 1)] if isinstance(rows, range) and rows else [(row, row + 1) for row in rows]
            spans = [(first + start * size, first + stop * size) for start, stop in runs]
            shape = (len(rows), *shape[1:])
        content = bytearray(sum(stop - start for start, stop in spans))
        place = 0
        with file.open("rb") as stream:
            for start, stop in spans:
                stream.seek(data + start)
                if stream.readinto(memoryview(content)[place : place + stop - start]) != stop - start:
                    raise ModelError(f"{file} is truncated", _DOWNLOAD_AGAIN)
                place += stop - start
        dtype = _DTYPES[entry["dtype"]]
        return torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)


class ModelTensors:
    """Tensors of a loaded model; of tied ones only the first name counts."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Sizes of all parameters."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def rows(self, name: str, rows: range) -> torch.Tensor:
        """These rows of the parameter."""
        return self._tensors[name][rows.start : rows.stop].cpu()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A tensor to write, made when its turn comes. make: gives it in `dtype` and `shape`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorEntry:
        """An existing tensor as it is."""
        return cls(dtype=tensor.dtype, shape=tuple(tensor.shape), make=lambda: tensor)


def write_tensors(path: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of which only one tensor at a time need exist; whole or not at all.

    The library can only write tensors that all exist. Raises OutputError.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name, entry in entries.items():
        end = place + prod(entry.shape) * entry.dtype.itemsize
        header[name] = {"dtype": names[entry.dtype], "shape": list(entry.shape), "data_offsets": [place, end]}
        place = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with whole_file(path) as part, part.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for name, entry in entries.items():
            tensor = entry.make().detach()
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced otherwise")
            flat = tensor.to("cpu").contiguous().reshape(-1)
            flat.view(torch.uint8).numpy().tofile(stream)
