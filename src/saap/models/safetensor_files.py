"""Checks of safetensors files that need only their headers."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from saap.errors import ModelError

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
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_DOWNLOAD_AGAIN = "Download or copy the file again"


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder. Raises ModelError if there are none, or not all, or others only."""
    index = folder / INDEX_NAME
    if index.exists():
        return _indexed_files(folder, index)
    if (folder / SINGLE_NAME).exists():
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
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise ModelError(f"{index} is no index of safetensors files", _DOWNLOAD_AGAIN) from None
    for name in names:
        if not isinstance(name, str) or name != PurePosixPath(name).name or name != PureWindowsPath(name).name:
            raise ModelError(
                f"{index} points outside its folder ({name!r})", "Do not use this checkpoint, or correct its index"
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}, named in {index.name}", "Download the missing files")
    return tuple(folder / name for name in names)


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
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
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
