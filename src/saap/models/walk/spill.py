"""Sequences of tensors that are kept in memory, or in files where memory is short."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from math import prod
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
"""Makes a sequence of tensors, each taken when the one before is kept: `list`, or the `keep` of a spill."""


def _filled(kept: Tensors, tensors: Iterable[Tensor]) -> Tensors:
    for tensor in tensors:
        kept.append(tensor)
    return kept


class Spill:
    """A folder of sequences of tensors, one file each, which goes when nobody holds the sequence any more.

    Files are read and written, not mapped: pages of a mapped file would count as memory of the process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, tensors: Iterable[Tensor]) -> Tensors:
        """A new sequence. Raises OutputError if its file cannot be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            kept = _SpilledTensors(self._folder / f"{uuid.uuid4().hex}.spill")
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        return _filled(kept, tensors)


class HostSpill:
    """Sequences of tensors in the memory of the host, in place of that of an accelerator."""

    def keep(self, tensors: Iterable[Tensor]) -> Tensors:
        """A new sequence."""
        return _filled(_HostTensors(), tensors)


class _HostTensors:
    """Each tensor comes back on the device that it had."""

    def __init__(self) -> None:
        self._held: list[tuple[Tensor, torch.device]] = []

    def append(self, tensor: Tensor, /) -> None:
        """Copy it to the host."""
        self._held.append((tensor.detach().cpu(), tensor.device))

    def __getitem__(self, index: int, /) -> Tensor:
        tensor, device = self._held[index]
        return tensor.to(device)

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


class _SpilledTensors:
    """One file. Each tensor comes back as a new one, with the device and the type that it had."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: list[tuple[int, tuple[int, ...], torch.dtype, torch.device]] = []
        self._end = 0
        path.touch()
        weakref.finalize(self, path.unlink, missing_ok=True)

    def append(self, tensor: Tensor, /) -> None:
        """Write it at the end of the file. Raises OutputError for a full disk."""
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            with self._path.open("ab") as file:
                flat.tofile(file)
        except OSError as error:
            raise _unwritable(self._path.parent, error) from error
        self._places.append((self._end, tuple(tensor.shape), tensor.dtype, tensor.device))
        self._end += flat.size

    def __getitem__(self, index: int, /) -> Tensor:
        place, shape, dtype, device = self._places[index]
        size = prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype, device=device)
        values = torch.from_numpy(np.fromfile(self._path, dtype=np.uint8, count=size, offset=place))
        return values.view(dtype).reshape(shape).to(device)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{folder} cannot be written ({error.strerror or error})", "Free some space there, or choose another --work-dir"
    )
