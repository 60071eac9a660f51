"""Settings of `saap eval`, `saap generate`, `saap chat` and speed measurements."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from saap.settings.export import GGUF_TYPE, GgufType, check_gguf_type
from saap.settings.prune import BOS
from saap.settings.recover import DENSE_CODE, DENSE_REVISION
from saap.settings.registry import RuntimeName
from saap.settings.setting import AtLeast1, Commas, Flag, Only, Seed, Settings, Source, Texts

PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The seven tasks of the SAAP paper by their names in lm-evaluation-harness; alias `paper`."""
perplexity_flag = partial(Flag, panel="Perplexity")
tasks_flag = partial(Flag, panel="Zero-shot tasks")
writing_flag = partial(Flag, panel="Generation")
dense_flag = partial(Flag, panel="Dense model")
speed_flag = partial(Flag, panel="Speed")
MAX_NEW_TOKENS = "Maximum number of new tokens for each prompt."


class SpeedSettings(Settings):
    """Settings of speed measurements, in interleaved rounds."""

    runtime: Annotated[RuntimeName, speed_flag("Runtime of the speed measurement.")] = RuntimeName.TRANSFORMERS
    gguf_type: Annotated[GgufType, speed_flag(GGUF_TYPE, old=("quantization",))] = GgufType.F16
    prompt_tokens: Annotated[AtLeast1, speed_flag("Tokens of the prompt.")] = 128
    new_tokens: Annotated[AtLeast1, speed_flag("Number of new tokens.")] = 32
    rounds: Annotated[AtLeast1, speed_flag("Number of measurements; the median is reported.")] = 5

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_gguf_type(self.gguf_type, self.runtime)
        return self


def unread(given: Sequence[str], needed: str) -> tuple[str, str]:
    """Problem and remedy of flags that nothing reads without another one."""
    return f"nothing reads {' and '.join(given)} without {needed}", f"Add {needed}, or leave it out"


class EvalRequest(Settings):
    """Measurements of a model, and of the dense model for comparison.

    dense_revision, dense_trust_remote_code: of `dense`; by default the revision in the pruned model's manifest, and no
    remote code.
    """

    texts: Annotated[
        Texts, perplexity_flag("Text, repeatable: wikitext2, ptb, c4, bundled, or a file.", flag="--perplexity")
    ] = ()
    window: Annotated[int, Field(ge=2), perplexity_flag("Tokens per perplexity window.")] = 512
    stride: Annotated[
        AtLeast1 | None, perplexity_flag("Tokens between the starts of two windows.", default="the window")
    ] = None
    bos: Annotated[bool, perplexity_flag(BOS)] = True
    max_tokens: Annotated[
        Annotated[int, Field(ge=2)] | None, perplexity_flag("Maximum number of tokens of each text.")
    ] = None
    tasks: Annotated[
        tuple[str, ...],
        Commas,
        tasks_flag(
            "Tasks of lm-evaluation-harness, or `paper` for the seven of the SAAP paper.", metavar="TASK[,TASK...]"
        ),
    ] = ()
    task_data: Annotated[
        Path | None, tasks_flag("Folder with TASK.SPLIT.jsonl files, instead of the hub.", metavar="DIR")
    ] = None
    limit: Annotated[AtLeast1 | None, tasks_flag("Only the first N questions of each task.")] = None
    rounded: Annotated[
        bool, tasks_flag(
            "Round products to bfloat16 while tasks are scored, which can be faster.", name="rounded_tasks",
            aliases=("rounded",),
        ),
    ] = False  # fmt: skip
    prompts: Annotated[
        Source | None,
        writing_flag("Prompts that replace the bundled ones: .txt, or .jsonl with prompt, answer.", metavar="FILE"),
    ] = None
    generated_tokens: Annotated[AtLeast1, writing_flag(MAX_NEW_TOKENS, name="max_new_tokens", old=("tokens",))] = 128
    chat: Annotated[
        Path | None, writing_flag("Conversations (.jsonl with messages) for the perplexity of answers.", metavar="FILE")
    ] = None
    dense: Annotated[
        Source | None, dense_flag(
            "The dense model to compare with.", old=("against",), metavar="MODEL",
            default="generation and speed: the one MODEL was pruned from",
        ),
    ] = None  # fmt: skip
    dense_revision: Annotated[str | None, dense_flag(DENSE_REVISION, default="as MODEL's manifest says")] = None
    dense_trust_remote_code: Annotated[bool, dense_flag(DENSE_CODE)] = False
    speed: Annotated[
        SpeedSettings | None,
        speed_flag("Tokens per second of prefill and of decoding (batch 1)."),
        Only(("runtime", "gguf_type")),
    ] = None
    seed: Annotated[Seed, writing_flag("Seed of sampled text.")] = 0

    @field_validator("tasks")
    @classmethod
    def _paper(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return PAPER_TASKS if tasks == ("paper",) else tasks

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"--stride {self.stride} does not fit --window {self.window}", f"Give 1 to {self.window}")
        for flag, measured, names in (
            ("--perplexity", self.texts, ("stride", "max_tokens")),
            ("--tasks", self.tasks, ("task_data", "limit", "rounded")),
        ):
            if not measured and (given := self.flags_changed(*names)):
                raise ValueError(*unread(given, flag))
        return self

    @property
    def names_nothing(self) -> bool:
        """Whether there is nothing to measure."""
        return not any((self.texts, self.tasks, self.prompts, self.chat, self.speed))


class GenerationSettings(Settings):
    """Generation settings. temperature 0: greedy; above: sampled with `seed`."""

    max_tokens: Annotated[AtLeast1, writing_flag(MAX_NEW_TOKENS, name="max_new_tokens")] = 128
    temperature: Annotated[float, Field(ge=0), writing_flag("0: greedy; above: sampled.")] = 0.0
    seed: Annotated[Seed, writing_flag("Seed of the sampling.")] = 0
    chat: Annotated[bool, writing_flag("Use the chat template, or continue the text itself.")] = True


class DenseSettings(Settings):
    """The dense model whose answers are shown together with MODEL's."""

    dense: Annotated[
        Source | None,
        dense_flag(
            "The dense model to compare with.", metavar="MODEL", old=("against",), default="what MODEL was pruned from"
        ),
    ] = None
    no_dense: Annotated[bool, dense_flag("Show MODEL alone.")] = False
    dense_revision: Annotated[str | None, dense_flag(DENSE_REVISION, default="as MODEL's manifest says")] = None
    dense_trust_remote_code: Annotated[bool, dense_flag(DENSE_CODE)] = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.no_dense and (given := self.flags_changed("dense", "dense_revision", "dense_trust_remote_code")):
            raise ValueError(f"--no-dense and {given[0]} were given together", "Give one of the two")
        return self
