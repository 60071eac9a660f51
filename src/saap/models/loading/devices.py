"""Selection of devices and dtypes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from saap.core.errors import ConfigurationError, ModelError

DeviceMap = str | Mapping[str, int | str]
"""Device map of transformers and accelerate: a strategy such as auto, or a dictionary."""

DEVICE_MAPS = ("auto", "balanced", "sequential")
"""Strategies of accelerate to place the blocks of a model on several devices."""

PRIMITIVE_CACHE_CAPACITY = "64"
"""Kinds of products, by shape, that oneDNN keeps compiled; of its 1,024 each takes up to a megabyte."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` prefers cuda, then mps, then cpu. Raises ConfigurationError if unavailable."""
    available = _available()
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    with suppress(RuntimeError):  # torch does not know the name
        device = torch.device(name)
        if available.get(device.type) and (device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()):
            return device
    raise ConfigurationError(f"--device {name} is not available on this machine", "Use auto, cpu, cuda, cuda:N or mps")


def _available() -> dict[str, bool]:
    """Kinds of devices in the order of `auto`, and whether they are available."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def check_known(device_map: DeviceMap) -> None:
    """Raise ConfigurationError for a strategy that is not among DEVICE_MAPS."""
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise ConfigurationError(f"--device-map {device_map} is unknown", f"Use {', '.join(DEVICE_MAPS)}")


def spread_over(model: nn.Module) -> dict[str, int | str] | None:
    """The device map if accelerate placed the model on several devices; None for a single device."""
    found = getattr(model, "hf_device_map", None)
    if not isinstance(found, Mapping) or len({str(place) for place in found.values()}) < 2:
        return None
    return {str(path): place if isinstance(place, int) else str(place) for path, place in found.items()}


def copied(model: nn.Module) -> nn.Module:
    """A deep copy without the wrappers that accelerate puts around methods of a model on several devices.

    They are bound to the original model, and would act on it instead of the copy.
    """
    twin = copy.deepcopy(model)
    if spread_over(model) is not None:
        for name in [name for name in vars(twin) if name != "forward" and callable(getattr(nn.Module, name, None))]:
            del vars(twin)[name]
    return twin


def require_whole_blocks(model: nn.Module, blocks: Sequence[str]) -> None:
    """Raise ModelError for a decoder block with weights on more than one device. blocks: their paths."""
    for path in blocks:
        places = sorted({str(parameter.device) for parameter in model.get_submodule(path).parameters()})
        if len(places) > 1:
            raise ModelError(
                f"The block {path} is on {len(places)} devices ({', '.join(places)})",
                "Use a device map that keeps each decoder block together",
            )


def require_values(model: nn.Module) -> None:
    """Raise ModelError for a model with offloaded weights, or on several devices without a device map.

    accelerate's hooks, which come with the map, move the inputs of a module to its device.
    """
    places = {name: tensor.device for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    away = [name for name, device in places.items() if device.type == "meta"]
    if away:
        raise ModelError(
            f"{len(away)} tensors of the model have no values in memory (the first is {away[0]})",
            "Load it without offloading, or give its path and --max-memory",
        )
    devices = sorted({str(device) for device in places.values()})
    if len(devices) > 1 and spread_over(model) is None:
        raise ModelError(
            f"The given model is on {len(devices)} devices ({', '.join(devices)}) without a device map",
            "Load it with device_map='auto', or on one device",
        )


def computable(model: nn.Module) -> nn.Module:
    """The model itself, or a float32 copy if any part is float16, whose range is too small for gradients."""
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    return copied(model).to(torch.float32) if half else model


def pick_dtype(name: str = "auto", *, source: torch.dtype) -> torch.dtype:
    """The dtype to write. `auto`: bfloat16 for sources of 16 bits or fewer (GGUF counts as such), else the source's.

    Raises ConfigurationError for an unknown name.
    """
    if name == "auto":
        return torch.bfloat16 if source.itemsize <= 2 else source
    if name not in DTYPES:
        raise ConfigurationError(f"--dtype {name} is unknown", f"Use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def working_dtype(device: torch.device, source: torch.dtype) -> torch.dtype:
    """The dtype to compute in: bfloat16 stays bfloat16 on CUDA, all other 16-bit types are widened to float32."""
    if source == torch.bfloat16 and device.type == "cuda":
        return source
    return torch.float32 if source.itemsize <= 2 else source


def quick_products(device: torch.device, written: torch.dtype = torch.bfloat16) -> torch.dtype | None:
    """The type of matrix products in training and in long forward passes, None for that of the weights.

    bfloat16 on a CPU with instructions for it, if the result is written in 16 bits or fewer anyway. This depends only
    on the processor, not on a speed test, so results on one machine are reproducible bit by bit. torch's precision
    `medium` for float32 weights is half as fast there.
    """
    if device.type != "cpu" or written.itemsize > 2:
        return None
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else None


@contextmanager
def _medium_products(wanted: bool) -> Iterator[None]:
    """Context with float32 products in torch's precision `medium`, if requested.

    Products are then by oneDNN, which reads its limit from the environment when it first keeps one.
    """
    if wanted:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVE_CACHE_CAPACITY)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if wanted else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def quick_float32_products() -> AbstractContextManager[None]:
    """Context in which the CPU multiplies float32 matrices with its faster library, if that is as exact.

    The torch setting for it rounds to bfloat16 on some processors, so it is tested on this one. On an AMD processor
    without such instructions it doubles the speed. Other devices are not affected.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand(256, 256, generator=generator), torch.rand(256, 256, generator=generator)
    exact = left.double() @ right.double()
    with _medium_products(True):
        error = float(((left @ right).double() - exact).norm() / exact.norm())
    return _medium_products(error <= 1e-6 and not torch.cuda.is_available())


def multiplied_in(products: torch.dtype | None, device: torch.device) -> AbstractContextManager[None]:
    """Context in which matrices are multiplied in a type (autocast), None for that of the factors."""
    return nullcontext() if products is None else torch.autocast(device.type, products)
