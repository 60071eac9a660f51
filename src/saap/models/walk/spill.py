"""Spilled sequences of tensors: kept in host memory or in files instead of device memory."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from saap.core.errors import OutputError


class Tensors(Protocol):
    """Tensors in the order in which they were appended."""

    def append(self, tensor: Tensor, /) -> None:
        """Add one at the end."""

    def __getitem__(self, index: int, /) -> Tensor: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...


Keep = Callable[[Iterable[Tensor]], Tensors]
"""Function that stores an iterable of tensors one by one: `list`, or the `keep` of a spill."""


@dataclass(frozen=True, slots=True)
class Spill:
    """Store of tensor sequences: one file each in `folder`, or without a folder in host memory.

    A file is deleted when its sequence is no longer referenced.
    """

    folder: Path | None = None

    def keep(self, tensors: Iterable[Tensor]) -> Tensors:
        """A new sequence. Raises OutputError if its file cannot be written."""
        kept = _Kept(None if self.folder is None else _SpillFile(self.folder))
        for tensor in tensors:
            kept.append(tensor)
        return kept


class _SpillFile:
    """Tensors in one file, read and written: pages of a mapped one would count as memory of the process."""

    def __init__(self, folder: Path) -> None:
        self._path, self._end = folder / f"{uuid.uuid4().hex}.spill", 0
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()
        weakref.finalize(self, self._path.unlink, missing_ok=True)

    def write(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Append a tensor. Returns a function that reads it."""
        flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        with self._explained(), self._path.open("ab") as file:
            flat.tofile(file)
        self._end += flat.size
        return partial(self._read, self._end - flat.size, flat.size, tuple(tensor.shape), tensor.dtype)

    def _read(self, place: int, size: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not size:
            return torch.empty(shape, dtype=dtype)
        values = torch.from_numpy(np.fromfile(self._path, dtype=np.uint8, count=size, offset=place))
        return values.view(dtype).reshape(shape)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self._path.parent} cannot be written ({error.strerror or error})",
                "Free some space there, or choose another --work-dir",
            ) from error


class _Kept:
    """Tensors in host memory or in a file. Each is returned on its original device."""

    def __init__(self, file: _SpillFile | None) -> None:
        self._file = file
        self._kept: list[tuple[Callable[[], Tensor], torch.device]] = []

    def append(self, tensor: Tensor, /) -> None:
        stored = tensor.detach().cpu()
        self._kept.append(((lambda: stored) if self._file is None else self._file.write(stored), tensor.device))

    def __getitem__(self, index: int, /) -> Tensor:
        read, device = self._kept[index]
        return read().to(device)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))
