"""What measuring, comparing and exporting are asked for: one place for the names that commands and recipes share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, field_validator

from saap.settings.prune import GgufType, MethodChoice, PruneConfig
from saap.settings.registry import ExportFormat, RuntimeName

PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The seven tasks of the SAAP paper, by the names of lm-evaluation-harness; `paper` stands for them."""


class SpeedSettings(BaseModel):
    """How speed is measured. gguf_type: of the weights in llama.cpp. rounds: in which the models take turns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: RuntimeName = RuntimeName.TRANSFORMERS
    gguf_type: GgufType = GgufType.F16
    prompt_tokens: int = 128
    new_tokens: int = 32
    rounds: int = 5


class EvalRequest(BaseModel):
    """What to measure.

    texts: names of data sets, files, or `bundled`. window, stride: of the perplexity; stride None is the window; bos:
    whether each window begins with the tokenizer's BOS token, if it puts one before texts.
    max_tokens: only the first of each text. tasks: zero-shot tasks, from the hub or from files in `task_data`; limit:
    only the first questions; rounded: round products to bfloat16 meanwhile. prompts: a file or `bundled`, to generate
    from and to ask facts of. chat: a file of conversations. dense: the model that a pruned one is compared with.
    dense_revision, dense_trust_remote_code: of that model, or of `against` where only that is named; by default its
    revision is that of the manifest of the pruned one, and its code is not run. against_revision,
    against_trust_remote_code: of `against` where `dense` is another model.
    speed: how to measure tokens per second,
    None: not; against: the model to measure it beside, else `dense`, else the one that a pruned one was made from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: tuple[str, ...] = ()
    window: int = 512
    stride: int | None = None
    bos: bool = True
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    limit: int | None = None
    rounded: bool = False
    prompts: str | None = None
    generated_tokens: int = 128
    chat: Path | None = None
    dense: str | None = None
    dense_revision: str | None = None
    dense_trust_remote_code: bool = False
    speed: SpeedSettings | None = None
    against: str | None = None
    against_revision: str | None = None
    against_trust_remote_code: bool = False
    seed: int = 0

    @field_validator("tasks")
    @classmethod
    def _paper(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return PAPER_TASKS if tasks == ("paper",) else tasks

    @property
    def names_nothing(self) -> bool:
        """Whether there is nothing to measure."""
        measured = (self.texts, self.tasks, self.prompts, self.chat, self.speed)
        return not any(measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareRequest:
    """What to compare.

    methods: each with the roles that it may prune, None for the configuration's. config: of the method under test;
    its calibration and its ratios are everybody's. restorations: False cuts only (FLAP adds its biases), True also
    restores. evaluation: the texts and tasks to measure on. task_ratios: ask the tasks at these pruning ratios only,
    None for all of them: tasks take far longer than perplexity.
    """

    methods: tuple[MethodChoice, ...]
    config: PruneConfig
    seeds: tuple[int, ...] = (0,)
    restorations: tuple[bool, ...] = (False, True)
    evaluation: EvalRequest
    task_ratios: tuple[float, ...] | None = None

    def asks_tasks(self, ratio: float) -> bool:
        """Whether a model pruned by `ratio` answers the tasks."""
        return bool(self.evaluation.tasks) and (self.task_ratios is None or ratio in self.task_ratios)


class ExportRequest(BaseModel):
    """What to export: the format, and for GGUF the type of the weights and whether llama.cpp checks the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: ExportFormat = ExportFormat.GGUF
    quantization: GgufType = GgufType.F16
    verify: bool = True
