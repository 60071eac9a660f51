"""Pretended devices on the CPU, `lazy:0`, `lazy:1`, ..., which refuse to compute with tensors of another device.

They show, without a second device, that nothing assumes a model to lie on the CPU, or on one device; as an accelerator
they may have no float64, as Apple's GPUs, and a limit of memory. A tensor there wraps one of the CPU; PyTorch has the
device type `lazy` for such backends, and nothing else uses it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.utils._device import _device_constructors

from saap.discovery.blocks import find_blocks

FIRST, SECOND = "lazy:0", "lazy:1"
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


@dataclass
class Accelerator:
    """What the pretended devices can do, and what lies on them.

    float64: whether they have it. limit: bytes that may lie there, None for any number. held, peak: bytes that lie
    there, now and at most so far; only of what the program holds, not what an operation takes inside.
    """

    float64: bool = True
    limit: int | None = None
    held: int = 0
    peak: int = 0
    _storages: dict[int, int] = field(default_factory=dict)

    def count(self, placed: Placed, raw: Tensor) -> None:
        """Count the memory of a tensor until all that share it are gone."""
        if raw.dtype == torch.float64 and not self.float64:
            raise TypeError("Cannot convert a lazy Tensor to float64 dtype as the framework doesn't support float64")
        storage = raw.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return
        if key not in self._storages:
            self.held += size
            self.peak = max(self.peak, self.held)
        self._storages[key] = self._storages.get(key, 0) + 1
        placed.share = _Share()
        weakref.finalize(placed.share, self._release, key, size)
        if self.limit is not None and self.held > self.limit:
            raise torch.OutOfMemoryError(f"{self.held:,} bytes do not fit into {self.limit:,}")

    def _release(self, key: int, size: int) -> None:
        self._storages[key] -= 1
        if not self._storages[key]:
            del self._storages[key]
            self.held -= size


class _Share:
    """Lives as long as a tensor; a finalizer of the tensor itself would keep modules from moving it."""


_present: Accelerator | None = None


class Placed(Tensor):
    """A tensor on a pretended device. raw: the one on the CPU. share: of the memory there."""

    raw: Tensor
    share: _Share

    @staticmethod
    def __new__(cls, raw: Tensor, device: torch.device) -> Placed:
        made = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=device
        )
        made.raw = raw
        if _present is not None:
            _present.count(made, raw)
        return made

    @property
    def data(self) -> Placed:
        return Placed(self.raw, self.device)

    @data.setter
    def data(self, new: Placed) -> None:
        Tensor.data.__set__(self, new)
        self.raw = new.raw

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["raw"], self.device

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], device: torch.device, size: Any, stride: Any) -> Placed:
        return Placed(inner["raw"], device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _compute(func, args, dict(kwargs or {}))


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU, if all tensors lie on one device, and put what comes out there."""
    tensors = list(_tensors(args)) + list(_tensors(tuple(kwargs.values())))
    placed = [tensor for tensor in tensors if isinstance(tensor, Placed)]
    places = {tensor.device for tensor in tensors if isinstance(tensor, Placed) or tensor.dim() > 0}
    if func not in _MOVES and len(places) > 1:
        raise RuntimeError(f"{func} is given tensors on {', '.join(sorted(map(str, places)))}")
    device = kwargs.get("device")
    if func is torch.ops.aten.copy_.default:
        device = args[0].device
    elif device is None:
        device = placed[0].device if placed else "cpu"
    device = torch.device(device)
    args = _mapped(args, _raw)
    kwargs = {name: _mapped(value, _raw) for name, value in kwargs.items() if name != "pin_memory"}
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    made = func(*args, **kwargs)
    if device.type != "lazy":
        return made
    known = {id(tensor.raw): tensor for tensor in placed}
    return _mapped(made, lambda tensor: known[id(tensor)] if id(tensor) in known else Placed(tensor, device))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.raw if isinstance(tensor, Placed) else tensor


def _tensors(item: Any) -> Iterator[Tensor]:
    """Tensors of an operation, which are in lists at most: `_pytree` looks for more and takes ten times as long."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from _tensors(part)


def _mapped(item: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, (list, tuple)) and any(True for _ in _tensors(item)):
        return type(item)([_mapped(part, change) for part in item])
    return item


@contextmanager
def pretended_devices(*, float64: bool = True, limit: int | None = None) -> Iterator[Accelerator]:
    """While it lasts, tensors can be made on `lazy:0`, `lazy:1`, ...; see Accelerator."""
    global _present
    _present = accelerator = Accelerator(float64=float64, limit=limit)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _compute(func, args, kwargs), "Lazy")
    stock = torch.tensor
    _device_constructors()  # remembered with the stock function, which a device context looks for

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = stock(*args, **kwargs)
        return made if device is None else made.to(device)

    torch.tensor = tensor  # its own way to another device passes by the fallback
    torch.lazy = SimpleNamespace()  # torch.utils.checkpoint looks for a module of each device
    try:
        yield accelerator
    finally:
        torch.tensor = stock
        del torch.lazy
        library._destroy()
        _present = None


def spread(model: nn.Module, first: int | None = None) -> nn.Module:
    """The model with its first blocks on the first device, the others and the last norm on the second.

    first: how many blocks; None for the first half, rounded up.
    """
    blocks = find_blocks(model)
    most = (len(blocks) + 1) // 2 if first is None else first
    places = {path: FIRST if index < most else SECOND for index, path in enumerate(blocks)}
    for path, module in model.named_modules():
        inside = any(f"{path}.".startswith(f"{block}.") for block in blocks)
        if path and not inside and not module._modules:
            places[path] = SECOND if "norm" in path and "embed" not in path else FIRST
    spread_model: nn.Module = dispatch_model(model, places, main_device=FIRST)
    return spread_model
