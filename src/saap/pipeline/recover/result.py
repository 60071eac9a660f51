"""What a recovery gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from saap.core.manifest import StageRecord
from saap.recovery.train import Training


class RecoverReport(BaseModel):
    """Figures of a recovery.

    perplexity_before: of the model as it came; perplexity_quantised: before training, None where nothing was
    quantised; perplexity_dense, answer_dense: of the model that it was pruned from, where known. gap_closed: see
    `share_closed`. bytes: of the plain weights in `dtype`; packed_bytes: of integers, scales and zero points.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    path: str | None
    tuning: str
    bits: int | None
    group_size: int | None
    parameters: int
    bytes: int
    packed_bytes: int | None
    dtype: str
    evaluation_text: str
    evaluation_tokens: int
    perplexity_dense: float | None
    perplexity_before: float
    perplexity_quantised: float | None
    perplexity: float
    gap_closed: float | None
    validation_before: float
    validation: float
    best_step: int
    steps: int
    tokens: int
    seconds: float
    stopped_by: str
    prompt: str
    answer_dense: str | None
    answer_before: str
    answer: str
    stages: tuple[StageRecord, ...]
    load_lines: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return self.model_dump()


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverResult:
    """A tuned model; its linear layers are packed unless plain LoRA was requested. path: its folder, if written."""

    model: nn.Module
    report: RecoverReport
    training: Training
    path: Path | None


def share_closed(dense: float, before: float, after: float) -> float | None:
    """Share of the gap in log-perplexity to the dense model that is closed, negative if it grew; None without a gap."""
    gap = math.log(before) - math.log(dense)
    return (math.log(before) - math.log(after)) / gap if gap > 0 else None
