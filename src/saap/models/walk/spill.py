"""Sequences of many tensors: packed in memory, or spilled to host memory or files."""

from __future__ import annotations

import uuid
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from saap.core.errors import OutputError

PIECE_BYTES = 2**26
"""More than the largest piece that an allocator keeps to itself when it is freed (32 MiB in glibc)."""
SPILLED = ".spill"
"""Suffix of the files of sequences."""
T = TypeVar("T")


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


class Piece(NamedTuple):
    """Bytes of a tensor in a file, its shape and type, and the device that it is returned on."""

    place: int
    size: int
    shape: tuple[int, ...]
    dtype: str
    device: str


class StoredSequence(NamedTuple):
    """A sequence of tensors in a file of a spill's folder, by the file's name."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def end(self) -> int:
        """The bytes of the file that they need."""
        return max((piece.place + piece.size for piece in self.pieces), default=0)


@dataclass(frozen=True, slots=True)
class Spill:
    """Store of tensor sequences: one file each in `folder`, or without a folder in host memory.

    A file is deleted when its sequence is no longer referenced. resumed: with it, a walk records its finished blocks in
    the folder; it is called when a walk resumes there.
    """

    folder: Path | None = None
    resumed: Callable[[], None] | None = None

    def keep(self, tensors: Iterable[Tensor]) -> Tensors:
        """A new sequence. Raises OutputError if its file cannot be written."""
        kept = _HostTensors() if self.folder is None else FileTensors(self.folder)
        for tensor in tensors:
            kept.append(tensor)
        return kept


class _Stored(ABC, Generic[T]):
    """A sequence of tensors, each kept as a piece from which it is read."""

    def __init__(self, pieces: Iterable[T] = ()) -> None:
        self._pieces = deque(pieces)

    @abstractmethod
    def _read(self, piece: T) -> Tensor:
        """The tensor of a piece, on its original device."""

    def popleft(self) -> Tensor:
        """Remove the first and return it."""
        return self._read(self._pieces.popleft())

    def __getitem__(self, index: int, /) -> Tensor:
        return self._read(self._pieces[index])

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


class _HostTensors(_Stored[tuple[Tensor, torch.device]]):
    """Tensors in host memory."""

    def append(self, tensor: Tensor, /) -> None:
        """Add one at the end."""
        self._pieces.append((tensor.detach().cpu(), tensor.device))

    def _read(self, piece: tuple[Tensor, torch.device]) -> Tensor:
        stored, device = piece
        return stored.to(device)


class FileTensors(_Stored[Piece]):
    """Tensors in one file, read and written: pages of a mapped one would count as memory of the process.

    stored: an existing file, which is not deleted with the sequence.
    """

    def __init__(self, folder: Path, stored: StoredSequence | None = None) -> None:
        super().__init__(() if stored is None else stored.pieces)
        self._path = folder / (f"{uuid.uuid4().hex}{SPILLED}" if stored is None else stored.name)
        self._end = 0 if stored is None else stored.end
        self._deleted: weakref.finalize[..., FileTensors] | None = None
        if stored is None:
            with self._explained():
                folder.mkdir(parents=True, exist_ok=True)
                self._path.touch()
            self._deleted = weakref.finalize(self, self._path.unlink, missing_ok=True)

    def stay(self) -> StoredSequence:
        """Have the file outlive this sequence. Returns what opens it again."""
        if self._deleted is not None:
            self._deleted.detach()
        return StoredSequence(self._path.name, tuple(self._pieces))

    def append(self, tensor: Tensor, /) -> None:
        """Add one at the end of the file."""
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with self._explained(), self._path.open("ab") as file:
            flat.tofile(file)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._pieces.append(Piece(self._end, flat.size, tuple(tensor.shape), dtype, str(tensor.device)))
        self._end += flat.size

    def _read(self, piece: Piece) -> Tensor:
        dtype: torch.dtype = getattr(torch, piece.dtype)
        if not piece.size:
            return torch.empty(piece.shape, dtype=dtype, device=piece.device)
        values = torch.from_numpy(np.fromfile(self._path, dtype=np.uint8, count=piece.size, offset=piece.place))
        return values.view(dtype).reshape(piece.shape).to(piece.device)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self._path.parent} cannot be written ({error.strerror or error})",
                "Free some space there, or choose another --work-dir",
            ) from error
