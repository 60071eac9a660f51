"""What measuring and exporting are asked for: one place for the names that the command line and recipes share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, field_validator

PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The seven tasks of the SAAP paper, by the names of lm-evaluation-harness; `paper` stands for them."""


class EvalRequest(BaseModel):
    """What to measure.

    texts: names of data sets, files, or `bundled`. window, stride: of the perplexity; stride None is the window.
    max_tokens: only the first of each text. tasks: zero-shot tasks, from the hub or from files in `task_data`; limit:
    only the first questions. prompts: a file or `bundled`, to generate from and to ask facts of. chat: a file of
    conversations. dense: the model that a pruned one is compared with. beside: further models whose answers go into
    `human_kit`, a page to write.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: tuple[str, ...] = ()
    window: int = 512
    stride: int | None = None
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    limit: int | None = None
    prompts: str | None = None
    generated_tokens: int = 128
    chat: Path | None = None
    dense: str | None = None
    beside: tuple[str, ...] = ()
    human_kit: Path | None = None
    seed: int = 0

    @field_validator("tasks")
    @classmethod
    def _paper(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return PAPER_TASKS if tasks == ("paper",) else tasks

    @property
    def names_nothing(self) -> bool:
        """Whether there is nothing to measure."""
        return not (self.texts or self.tasks or self.prompts or self.chat or self.human_kit)


class ExportFormat(StrEnum):
    """What a model can be written as."""

    GGUF = "gguf"
    DECILM = "decilm"


class GgufType(StrEnum):
    """How the weights of a GGUF file are stored."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"


class ExportRequest(BaseModel):
    """What to export: the format, and for GGUF the type of the weights and whether llama.cpp checks the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: ExportFormat = ExportFormat.GGUF
    quantization: GgufType = GgufType.F16
    verify: bool = True
