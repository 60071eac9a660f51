"""Weights by name, read a few rows at a time: from safetensors files, or from a model that is loaded already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor, nn

from saap.models.checkpoint.safetensor_files import read_header

Shape = tuple[int, ...]


class StoredTensors(Protocol):
    """Where an export takes its weights from. shapes: of every tensor by its name in transformers."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Sizes of all tensors."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first..last-1 of a tensor along its first axis, on the CPU, in the stored dtype."""


class SafetensorTensors:
    """Tensors in safetensors files. A file is mapped only while rows are read, so that no others stay in memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._shapes: dict[str, Shape] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            for name, entry in read_header(file).items():
                self._shapes[name] = tuple(entry["shape"])
                self._files[name] = file

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Sizes of all tensors, from the headers."""
        return self._shapes

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Read these rows from the file."""
        with safe_open(self._files[name], framework="pt") as file:
            found: Tensor = file.get_slice(name)[first:last]
            return found


class ModelTensors:
    """Tensors of a loaded model; of tied ones only the first name counts."""

    def __init__(self, model: nn.Module) -> None:
        seen: set[int] = set()
        self._tensors: dict[str, Any] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                self._tensors[name] = tensor.detach()

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Sizes of all parameters."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """These rows of the parameter."""
        found: Tensor = self._tensors[name][first:last].cpu()
        return found
