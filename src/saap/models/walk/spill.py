"""Sequences of many tensors: packed in memory, or spilled to host memory or files."""

from __future__ import annotations

import uuid
import weakref
from collections import deque
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

PIECE_BYTES = 2**26
"""More than the largest piece that an allocator keeps to itself when it is freed (32 MiB in glibc)."""


class Tensors(Protocol):
    """Tensors in the order in which they were appended."""

    def append(self, tensor: Tensor, /) -> None:
        """Add one at the end."""

    def popleft(self) -> Tensor:
        """Remove the first and return it."""

    def __getitem__(self, index: int, /) -> Tensor: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...


Keep = Callable[[Iterable[Tensor]], Tensors]
"""Function that stores an iterable of tensors one by one: `PackedTensors`, or the `keep` of a spill."""


def drained(tensors: Tensors) -> Iterator[Tensor]:
    """The tensors from first to last; each is removed from the sequence, so that its memory can be freed."""
    while len(tensors):
        yield tensors.popleft()


class PackedTensors(deque[Tensor]):
    """Copies of tensors, those on the CPU side by side in large pieces of memory.

    As tensors of their own, allocated between temporary ones, they would fragment the heap, which then never shrinks.
    A piece is freed when none of its tensors is left.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._piece = torch.empty(0, dtype=torch.uint8)
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: Tensor, /) -> None:
        """Add a copy at the end."""
        super().append(self._packed(tensor.detach()) if tensor.device.type == "cpu" else tensor)

    def _packed(self, tensor: Tensor) -> Tensor:
        used = -(-tensor.nbytes // 64) * 64
        if len(self._piece) < tensor.nbytes:
            self._piece = torch.empty(max(PIECE_BYTES, used), dtype=torch.uint8)
        place, self._piece = self._piece[: tensor.nbytes], self._piece[used:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


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
        self._kept: deque[tuple[Callable[[], Tensor], torch.device]] = deque()

    def append(self, tensor: Tensor, /) -> None:
        stored = tensor.detach().cpu()
        self._kept.append(((lambda: stored) if self._file is None else self._file.write(stored), tensor.device))

    def popleft(self) -> Tensor:
        read, device = self._kept.popleft()
        return read().to(device)

    def __getitem__(self, index: int, /) -> Tensor:
        read, device = self._kept[index]
        return read().to(device)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))
