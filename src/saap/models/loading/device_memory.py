"""Memory of accelerators and of the machine: what is free, and the most that was taken."""

from __future__ import annotations

from pathlib import Path

import torch


def of_device(device: torch.device) -> int | None:
    """Bytes of an accelerator that this process has or could get; None for the CPU, and where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return torch.mps.recommended_max_memory() if device.type == "mps" else None


def reset_peak(device: torch.device) -> None:
    """Start a new peak where the device keeps one (CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """The most bytes that tensors took on an accelerator since `reset_peak`; on mps what its allocator holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return torch.mps.driver_allocated_memory() if device.type == "mps" else 0


def of_machine() -> int | None:
    """Memory that this process has or could get without swapping; None where the system does not say."""
    free, own = _bytes_of("/proc/meminfo", "MemAvailable"), _bytes_of("/proc/self/status", "VmRSS")
    return None if free is None or own is None else free + own


def of_process() -> int:
    """Memory of this process now; 0 where the system does not say."""
    return _bytes_of("/proc/self/status", "VmRSS") or 0


def _bytes_of(file: str, field: str) -> int | None:
    """A field of a file of Linux that counts in kB; None where there is none."""
    try:
        fields = dict(line.split(":", 1) for line in Path(file).read_text().splitlines())
        return int(fields[field].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
