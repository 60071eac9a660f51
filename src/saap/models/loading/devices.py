"""Which device to work on, and in which dtype to write."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from saap.core.errors import ConfigurationError, ModelError

DeviceMap = str | Mapping[str, int | str]
"""Where the modules of a model go, as transformers and accelerate take it: a strategy such as auto, or a map."""

DEVICE_MAPS = ("auto", "balanced", "sequential")
"""Strategies of accelerate by which the blocks of a model are put on the devices of a machine."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` takes cuda, then mps, then cpu. Raises ConfigurationError if it is not there."""
    available = _available()
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    with suppress(RuntimeError):  # a name that torch does not know
        device = torch.device(name)
        if available.get(device.type) and (device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()):
            return device
    raise ConfigurationError(f"--device {name} is not available on this machine", "Use auto, cpu, cuda, cuda:N or mps")


def _available() -> dict[str, bool]:
    """Kinds of devices that `auto` looks for, in this order, and whether they are there."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def check_known(device_map: DeviceMap) -> None:
    """Raise ConfigurationError for a strategy that is not among DEVICE_MAPS."""
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise ConfigurationError(f"--device-map {device_map} is unknown", f"Use {', '.join(DEVICE_MAPS)}")


def spread_over(model: nn.Module) -> dict[str, int | str] | None:
    """Which module lies where, if accelerate has put the model on several devices; None for a model on one."""
    found = getattr(model, "hf_device_map", None)
    if not isinstance(found, Mapping) or len({str(place) for place in found.values()}) < 2:
        return None
    return {str(path): place if isinstance(place, int) else str(place) for path, place in found.items()}


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; the guards that accelerate puts before methods of a model over several devices stay behind.

    They are bound to the model that they were made for, and would act on it in place of the copy.
    """
    twin = copy.deepcopy(model)
    if spread_over(model) is not None:
        for name in [name for name in vars(twin) if name != "forward" and callable(getattr(nn.Module, name, None))]:
            del vars(twin)[name]
    return twin


def require_whole_blocks(model: nn.Module, blocks: Sequence[str]) -> None:
    """Raise ModelError for a decoder block whose weights lie on more than one device. blocks: their paths."""
    for path in blocks:
        places = sorted({str(parameter.device) for parameter in model.get_submodule(path).parameters()})
        if len(places) > 1:
            raise ModelError(
                f"The block {path} lies on {len(places)} devices ({', '.join(places)})",
                "Use a device map that keeps each decoder block together",
            )


def require_values(model: nn.Module) -> None:
    """Raise ModelError for a model whose weights are offloaded, or lie on several devices without a device map.

    accelerate's hooks, which come with the map, move what goes into a module to where it computes.
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
            f"The given model lies on {len(devices)} devices ({', '.join(devices)}) without a device map",
            "Load it with device_map='auto', or on one device",
        )


def computable(model: nn.Module) -> nn.Module:
    """The model itself, or a copy in float32 if any part is float16, whose range gradients and activations leave."""
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
    """The dtype to compute in: bfloat16 models stay so on CUDA, all other 16 bit ones are widened to float32."""
    if source == torch.bfloat16 and device.type == "cuda":
        return source
    return torch.float32 if source.itemsize <= 2 else source


def quick_products(device: torch.device, written: torch.dtype) -> torch.dtype | None:
    """The type in which long forward passes may multiply matrices on a device, None for that of the weights.

    bfloat16 on a CPU with instructions for it, if the result is written in 16 bits or fewer anyway. The processor alone
    decides, not a trial of its speed, so that a machine always gives the same bits.
    """
    if device.type != "cpu" or written.itemsize > 2:
        return None
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else None


@contextmanager
def _medium_products(wanted: bool) -> Iterator[None]:
    """float32 products in torch's precision `medium` for a while, if that is wanted."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if wanted else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def quick_float32_products() -> AbstractContextManager[None]:
    """Let the CPU multiply float32 matrices by its quicker library for a while, if that is as exact.

    torch reaches it by a setting that on some processors rounds to bfloat16; a trial on this one decides. On an AMD
    processor without such instructions it doubles the speed. Other devices are not touched.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand(256, 256, generator=generator), torch.rand(256, 256, generator=generator)
    exact = left.double() @ right.double()
    with _medium_products(True):
        error = float(((left @ right).double() - exact).norm() / exact.norm())
    return _medium_products(error <= 1e-6 and not torch.cuda.is_available())


def rounded_products(device: torch.device) -> AbstractContextManager[None]:
    """Let the CPU multiply float32 matrices through bfloat16 for a while where that is quicker (torch's `medium`).

    Factors are rounded, sums are not: the usual precision of training, and quicker on processors with matrix units.
    Others compute as before. Other devices are not touched.
    """
    return _medium_products(device.type == "cpu" and not torch.cuda.is_available())
