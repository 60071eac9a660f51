"""safetensors files of a model folder: listing, and reading and writing tensor by tensor."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from saap.core.errors import ModelError, first_line
from saap.core.files import whole_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "C64": torch.complex64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_DOWNLOAD_AGAIN = "Download or copy the file again"
Shape = tuple[int, ...]


def tensors_once(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a checkpoint of a model has, parameters and buffers; tied ones have only their first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder. Raises ModelError if missing, incomplete, or only in other formats.

    As in transformers, a single file comes before an index, which an earlier model may have left.
    """
    if (folder / SINGLE_NAME).is_file():
        return (folder / SINGLE_NAME,)
    index = folder / INDEX_NAME
    if index.exists():
        return _indexed_files(folder, index)
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise ModelError(
            f"{folder} has its weights only in the pickle format ({', '.join(pickled[:3])}), which can run code",
            "Convert them to safetensors, e.g. with save_pretrained in an environment that trusts them",
        )
    raise ModelError(f"{folder} has no {SINGLE_NAME}", "Give a model with safetensors weights, or convert it")


def _indexed_files(folder: Path, index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = set()
    if not names:
        raise ModelError(f"{index} is not an index of safetensors files", _DOWNLOAD_AGAIN)
    for name in names:
        if not isinstance(name, str) or name != PureWindowsPath(name).name:  # also splits at slashes
            raise ModelError(
                f"{index} points outside its folder ({name!r})", "Do not use this checkpoint, or correct its index"
            )
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}, listed in {index.name}", "Download the missing files")
    return tuple(folder / name for name in sorted(names))


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """An open safetensors file, complete by its header. Raises ModelError if it is damaged or truncated."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged or not safetensors ({first_line(error)})", _DOWNLOAD_AGAIN) from None


def stored_dtype(files: Sequence[Path]) -> torch.dtype:
    """The dtype of most values in the files. Raises ModelError if a file is damaged or truncated."""
    stored, values = StoredTensors.in_files(files), Counter[torch.dtype]()
    for name, shape in stored.shapes.items():
        values[stored.dtypes[name]] += prod(shape)
    return next((dtype for dtype, _ in values.most_common() if dtype.is_floating_point), torch.float32)


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """Lazily read tensors by name. shapes, dtypes: of all tensors, known without reading.

    read: returns one tensor in its stored type. From a file it is a lazily read view that keeps the file mapped: copy
    what must outlive it.
    """

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], Tensor]

    @classmethod
    def in_files(cls, files: Sequence[Path]) -> StoredTensors:
        """Those of safetensors files. Raises ModelError for a damaged file."""
        found: dict[str, tuple[Path, Shape, torch.dtype]] = {}
        for file in files:
            with open_safetensors(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    stored = opened.get_slice(name)
                    found[name] = file, tuple(stored.get_shape()), _DTYPES.get(stored.get_dtype(), torch.uint8)

        def read(name: str) -> Tensor:
            # opened each time: an open file keeps all read pages in the memory of the process
            with open_safetensors(found[name][0]) as opened:
                tensor: Tensor = opened.get_tensor(name)
            return tensor

        shapes = {name: shape for name, (_, shape, _) in found.items()}
        return cls(shapes, {name: dtype for name, (_, _, dtype) in found.items()}, read)

    @classmethod
    def of_model(cls, model: nn.Module) -> StoredTensors:
        """Tensors of a model in memory as a checkpoint has them; tied tensors have only their first name."""
        tensors = {name: tensor.detach() for name, tensor in tensors_once(model).items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(shapes, {name: tensor.dtype for name, tensor in tensors.items()}, tensors.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A tensor to write, created on demand. make: returns it in `dtype` and `shape`."""

    dtype: torch.dtype
    shape: Shape
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorEntry:
        """An existing tensor."""
        return cls(dtype=tensor.dtype, shape=tuple(tensor.shape), make=lambda: tensor)


def write_tensors(path: Path, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, with only one tensor in memory at a time.

    The library requires all tensors in memory at once. Raises OutputError.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, entry in entries.items():
        start, end = end, end + prod(entry.shape) * entry.dtype.itemsize
        header[name] = {"dtype": names[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
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
