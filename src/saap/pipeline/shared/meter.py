"""Time and peak memory of the stages."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from saap.models.loading import device_memory
from saap.pipeline.shared.progress import Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What a stage took: wall-clock seconds, peak resident bytes of the process, peak bytes on an accelerator."""

    name: str
    seconds: float
    peak_resident_bytes: int
    peak_device_bytes: int


def _reset_peak() -> None:
    """Start a new peak where the system allows it (Linux); elsewhere the peak is that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_resident_bytes() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(slots=True)
class Meter:
    """Collects the costs of the stages of one run. device: where it computes."""

    reporter: Reporter
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stages: list[StageCost] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and measure it."""
        self.reporter.stage(name)
        device_memory.reset_peak(self.device)
        _reset_peak()
        start = time.perf_counter()
        yield
        self.stages.append(
            StageCost(
                name=name,
                seconds=round(time.perf_counter() - start, 3),
                peak_resident_bytes=_peak_resident_bytes(),
                peak_device_bytes=device_memory.peak(self.device),
            )
        )
