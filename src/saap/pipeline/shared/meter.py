"""Time and peak memory of the stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from saap.core.manifest import StageRecord
from saap.models.loading import memory
from saap.pipeline.shared.progress import Reporter
from saap.pipeline.shared.stages import Stage


@dataclass(slots=True)
class Meter:
    """Collects the costs of the stages of one run. device: compute device."""

    reporter: Reporter
    device: torch.device
    stages: list[StageRecord] = field(default_factory=list)

    @contextmanager
    def stage(self, stage: Stage | str, detail: str = "") -> Iterator[None]:
        """Announce a stage and measure it. detail: distinguishes several stages of the same title."""
        name = stage if isinstance(stage, str) else stage.title
        name += f" ({detail})" if detail else ""
        self.reporter.stage(name)
        memory.give_back()
        memory.reset_peak(self.device)
        start = time.perf_counter()
        yield
        self.stages.append(
            StageRecord(
                name=name,
                seconds=round(time.perf_counter() - start, 3),
                peak_resident_bytes=memory.peak_of_process(),
                peak_device_bytes=memory.peak_of_device(self.device),
            )
        )
