"""Sequences of tensors that are kept outside the memory of the device: in that of the host, or in files."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, Protocol

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


class Spill:
    """Sequences of tensors, each in a file of its own in `folder`, or without a folder in the memory of the host.

    A file is deleted when nobody holds its sequence any more.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def keep(self, tensors: Iterable[Tensor]) -> Tensors:
        """A new sequence. Raises OutputError if its file cannot be written."""
        kept = _HostTensors() if self.folder is None else _FileTensors(self.folder)
        for tensor in tensors:
            kept.append(tensor)
        return kept


class _HostTensors:
    """Tensors in the memory of the host. Each comes back on the device that it had."""

    def __init__(self) -> None:
        self._kept: list[tuple[Any, torch.device]] = []

    def append(self, tensor: Tensor, /) -> None:
        self._kept.append((self._store(tensor.detach().cpu()), tensor.device))

    def __getitem__(self, index: int, /) -> Tensor:
        stored, device = self._kept[index]
        return self._load(stored).to(device)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def _store(self, tensor: Tensor) -> Any:
        return tensor

    def _load(self, stored: Any) -> Tensor:
        tensor: Tensor = stored
        return tensor


class _FileTensors(_HostTensors):
    """Tensors in one file, read and written: pages of a mapped one would count as memory of the process."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path, self._end = folder / f"{uuid.uuid4().hex}.spill", 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()
        except OSError as error:
            raise self._unwritable(error) from error
        weakref.finalize(self, self._path.unlink, missing_ok=True)

    def _store(self, tensor: Tensor) -> Any:
        place, flat = self._end, tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            with self._path.open("ab") as file:
                flat.tofile(file)
        except OSError as error:
            raise self._unwritable(error) from error
        self._end += flat.size
        return place, tuple(tensor.shape), tensor.dtype

    def _load(self, stored: Any) -> Tensor:
        place, shape, dtype = stored
        size = prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        values = torch.from_numpy(np.fromfile(self._path, dtype=np.uint8, count=size, offset=place))
        return values.view(dtype).reshape(shape)

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self._path.parent} cannot be written ({error.strerror or error})",
            "Free some space there, or choose another --work-dir",
        )
