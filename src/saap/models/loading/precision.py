"""Helpers for double precision: some devices (Apple GPUs) have no float64."""

from __future__ import annotations

import torch
from torch import Tensor


def widest_dtype(device: torch.device) -> torch.dtype:
    """The type for sums over many tokens: float64, or float32 where the device has none."""
    if device.type not in ("cpu", "cuda", "meta"):
        try:
            torch.zeros(1, dtype=torch.float64, device=device)
        except (TypeError, RuntimeError):
            return torch.float32
    return torch.float64


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU if its device has none."""
    return (tensor if widest_dtype(tensor.device) == torch.float64 else tensor.cpu()).double()


def widened(tensor: Tensor) -> Tensor:
    """The tensor on its device, in the widest type of that device."""
    return tensor.to(widest_dtype(tensor.device))


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if its type is narrower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
