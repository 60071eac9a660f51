"""Free and peak memory of accelerators, the machine and this process."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch


def of_device(device: torch.device) -> int | None:
    """Accelerator memory in bytes that this process has or could get; None for the CPU or if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return torch.mps.recommended_max_memory() if device.type == "mps" else None


def of_machine() -> int:
    """Memory that this process has or could get without swapping."""
    return int(psutil.virtual_memory().available) + of_process()


def free(device: torch.device) -> int:
    """Memory that this process could still take on a device, without what its tensors have there already."""
    whole = of_device(device)
    if whole is None:
        return int(psutil.virtual_memory().available)
    cuda = device.type == "cuda"
    return whole - (torch.cuda.memory_allocated(device) if cuda else torch.mps.current_allocated_memory())


def of_process() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what small tensors had, next to what large ones then get."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def reset_peak(device: torch.device) -> None:
    """Reset the peaks if possible: of a CUDA device, and of the process on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_of_device(device: torch.device) -> int:
    """Peak bytes of tensors on an accelerator since `reset_peak`; on mps the memory of its allocator."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return torch.mps.driver_allocated_memory() if device.type == "mps" else 0


def peak_of_process() -> int:
    """Peak resident bytes of the process, on Linux since `reset_peak`, elsewhere since its start."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":  # the only resettable peak, which psutil does not provide
        with suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
