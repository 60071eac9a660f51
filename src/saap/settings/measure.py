"""What measuring, comparing, generating and exporting are asked for: names that commands and recipes share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from saap.core.errors import ConfigurationError
from saap.settings.prune import (
    BOS,
    GGUF_TYPE,
    GgufType,
    Method,
    MethodChoice,
    PruneConfig,
    RuntimeName,
    check_gguf_type,
)
from saap.settings.recover import DENSE_CODE, DENSE_REVISION
from saap.settings.setting import AtLeast1, Commas, Different, Flag, Names, Only, Ratio, Seed, Settings

PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The seven tasks of the SAAP paper, by the names of lm-evaluation-harness; `paper` stands for them."""
PERPLEXITY, TASKS, WRITING, DENSE, SPEED = "Perplexity", "Zero-shot tasks", "Generation", "Dense model", "Speed"
COMPARED, FORMAT = "Comparison", "Format"
FIVE_METHODS = "saap,llm-pruner-element2,flap,wanda-sp,magnitude"
MAX_NEW_TOKENS = "Tokens to write for each prompt, at most."


class SpeedSettings(Settings):
    """How speed is measured, in rounds in which the models take turns."""

    runtime: Annotated[RuntimeName, Flag(help="Where speed is measured.", panel=SPEED)] = RuntimeName.TRANSFORMERS
    gguf_type: Annotated[GgufType, Flag(help=GGUF_TYPE, panel=SPEED, old=("quantization",))] = GgufType.F16
    prompt_tokens: Annotated[AtLeast1, Flag(help="Tokens of the prompt.", panel=SPEED)] = 128
    new_tokens: Annotated[AtLeast1, Flag(help="Tokens that are written.", panel=SPEED)] = 32
    rounds: Annotated[AtLeast1, Flag(help="Measurements, of which the median counts.", panel=SPEED)] = 5

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_gguf_type(self)
        return self


class EvalRequest(Settings):
    """What to measure of a model, and of the dense model that it is compared with.

    dense_revision, dense_trust_remote_code: of `dense`, or of `against` where only that is specified; by default the
    revision of the manifest of the pruned model, and no code of its own. against: the model that speed is compared
    with, else `dense`, else the one that a pruned one was made from. against_revision, against_trust_remote_code: of
    `against` where `dense` is another model. beside: further models whose answers go into `human_kit`, a page to write.
    """

    texts: Annotated[
        tuple[str, ...],
        Names,
        Flag(
            help="Text to read, repeatable: wikitext2, ptb, c4, bundled, or a file.", panel=PERPLEXITY,
            flag="--perplexity", metavar="NAME|FILE", repeat=True,
        ),
    ] = ()  # fmt: skip
    window: Annotated[
        int, Field(ge=2), Flag(help="Tokens of each window that perplexity is measured in.", panel=PERPLEXITY)
    ] = 512
    stride: Annotated[
        AtLeast1 | None,
        Flag(help="Tokens from one window's start to the next's.", panel=PERPLEXITY, default="the window"),
    ] = None
    bos: Annotated[bool, Flag(help=BOS, panel=PERPLEXITY)] = True
    max_tokens: Annotated[
        Annotated[int, Field(ge=2)] | None, Flag(help="Read at most so many tokens of each text.", panel=PERPLEXITY)
    ] = None
    tasks: Annotated[
        tuple[str, ...],
        Commas,
        Flag(
            help="Tasks of lm-evaluation-harness, or `paper` for the seven of the SAAP paper.", panel=TASKS,
            metavar="TASK[,TASK...]",
        ),
    ] = ()  # fmt: skip
    task_data: Annotated[
        Path | None,
        Flag(help="Folder with TASK.SPLIT.jsonl files, instead of the hub.", panel=TASKS, metavar="DIR"),
    ] = None
    limit: Annotated[int | None, Flag(help="Only the first N questions of each task.", panel=TASKS)] = None
    rounded: Annotated[
        bool,
        Flag(
            help="Round products to bfloat16 while tasks are scored, which can be quicker.", panel=TASKS,
            name="rounded_tasks", aliases=("rounded",),
        ),
    ] = False  # fmt: skip
    prompts: Annotated[
        str | None,
        Flag(
            help="Prompts in place of the bundled ones: .txt, or .jsonl with prompt, answer.", panel=WRITING,
            metavar="FILE",
        ),
    ] = None  # fmt: skip
    generated_tokens: Annotated[
        AtLeast1, Flag(help=MAX_NEW_TOKENS, panel=WRITING, name="max_new_tokens", old=("tokens",))
    ] = 128
    chat: Annotated[
        Path | None,
        Flag(help="Conversations (.jsonl with messages) to measure answers of.", panel=WRITING, metavar="FILE"),
    ] = None
    dense: Annotated[
        str | None,
        Flag(
            help="The dense model to compare with.", panel=DENSE, metavar="MODEL",
            default="generation and speed: the one MODEL was pruned from",
        ),
    ] = None  # fmt: skip
    dense_revision: Annotated[
        str | None, Flag(help=DENSE_REVISION, panel=DENSE, default="as MODEL's manifest says")
    ] = None
    dense_trust_remote_code: Annotated[bool, Flag(help=DENSE_CODE, panel=DENSE)] = False
    beside: Annotated[
        tuple[str, ...],
        Flag(help="Another model for the page, repeatable.", panel=WRITING, metavar="MODEL", repeat=True),
    ] = ()
    human_kit: Annotated[
        Path | None,
        Flag(help="Write a blinded page on which people rate the answers.", panel=WRITING, metavar="FILE"),
    ] = None
    speed: Annotated[
        SpeedSettings | None,
        Flag(help="Tokens per second of prefill and of decoding (batch 1).", panel=SPEED),
        Only(("runtime", "gguf_type")),
    ] = None
    against: Annotated[str | None, Flag(instead="--dense")] = None
    against_revision: Annotated[str | None, Flag(instead="--dense-revision")] = None
    against_trust_remote_code: Annotated[bool, Flag(instead="--dense-trust-remote-code")] = False
    seed: Annotated[Seed, Flag(help="Seed of sampled text and of the page's order.", panel=WRITING)] = 0

    @field_validator("tasks")
    @classmethod
    def _paper(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        return PAPER_TASKS if tasks == ("paper",) else tasks

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stride is not None and self.stride > self.window:
            raise ConfigurationError(
                f"--stride {self.stride} does not fit --window {self.window}", f"Give 1 to {self.window}"
            )
        return self

    @property
    def names_nothing(self) -> bool:
        """Whether there is nothing to measure."""
        measured = (self.texts, self.tasks, self.prompts, self.chat, self.human_kit, self.speed)
        return not any(measured)


class GenerationSettings(Settings):
    """How a model answers a prompt. temperature 0: always the most likely token; above: sampled with `seed`."""

    max_tokens: Annotated[AtLeast1, Flag(help=MAX_NEW_TOKENS, panel=WRITING, name="max_new_tokens")] = 128
    temperature: Annotated[
        float, Field(ge=0), Flag(help="0: always the most likely token; above: sampled.", panel=WRITING)
    ] = 0.0
    seed: Annotated[Seed, Flag(help="Seed of the sampling.", panel=WRITING)] = 0
    chat: Annotated[bool, Flag(help="Use the chat template, or continue the text itself.", panel=WRITING)] = True


def _no_ratios(given: Any) -> Any:
    return () if given == "none" else given


def _restorations(given: Any) -> Any:
    """Both, yes or no, as False and True."""
    known = {"both": (False, True), "yes": (True,), "no": (False,)}
    if isinstance(given, str) and given not in known:
        raise ValueError("is unknown", f"It takes {', '.join(known)}")
    return known[given] if isinstance(given, str) else given


class CompareRequest(Settings):
    """What to compare.

    methods: each with the roles that it may prune, None for the configuration's. config: of the method under test;
    its calibration and its ratios are everybody's. restorations: False cuts only (FLAP adds its biases), True also
    reconstructs. evaluation: the texts and tasks to measure on. task_ratios: None for all of them: tasks take far
    longer than perplexity.
    """

    methods: Annotated[
        tuple[MethodChoice, ...],
        Commas,
        Different,
        Flag(
            help="Methods, each METHOD or METHOD@ROLE+ROLE to prune these only.",
            panel=COMPARED,
            metavar="M[,M...]",
            default=FIVE_METHODS,
        ),
    ] = Field(default_factory=lambda: tuple(MethodChoice(method=Method(name)) for name in FIVE_METHODS.split(",")))
    config: Annotated[
        PruneConfig,
        Only(
            (
                "pruning_ratios", "calibration", "samples", "sample_length", "refit_tokens", "bos", "roles", "align",
                "effort",
            ),
            {"pruning_ratios": "0.1,0.2,0.3"},
        ),
    ]  # fmt: skip
    seeds: Annotated[
        tuple[Seed, ...],
        Commas,
        Different,
        Flag(help="Seeds of the calibration samples.", panel=COMPARED, metavar="N[,N...]"),
    ] = (0,)
    restorations: Annotated[
        tuple[bool, ...],
        BeforeValidator(_restorations),
        Flag(
            help="Least-squares reconstruction by saap, for every method: both, yes or no.", panel=COMPARED,
            name="restore", metavar="both|yes|no", default="both",
        ),
    ] = (False, True)  # fmt: skip
    evaluation: Annotated[
        EvalRequest,
        Only(
            ("texts", "window", "bos", "max_tokens", "tasks", "task_data", "limit", "rounded"), {"texts": ("bundled",)}
        ),
    ]
    task_ratios: Annotated[
        tuple[Ratio, ...] | None,
        Commas,
        BeforeValidator(_no_ratios),
        Flag(
            help="Ask the tasks at these ratios only, or `none`.", panel=COMPARED, metavar="R[,R...]",
            default="at all",
        ),
    ] = None  # fmt: skip

    def asks_tasks(self, ratio: float) -> bool:
        """Whether a model pruned by `ratio` answers the tasks."""
        return bool(self.evaluation.tasks) and (self.task_ratios is None or ratio in self.task_ratios)


class ExportFormat(StrEnum):
    """What a model can be written as."""

    GGUF = "gguf"
    DECILM = "decilm"


class ExportRequest(Settings):
    """What to export: the format, and for GGUF the type of the weights and whether llama.cpp checks the file."""

    format: Annotated[
        ExportFormat,
        Flag(help="gguf, for llama.cpp and Ollama; decilm, a folder for vLLM (not tried there).", panel=FORMAT),
    ] = ExportFormat.GGUF
    quantization: Annotated[GgufType, Flag(help="Of the weights in GGUF.", panel=FORMAT)] = GgufType.F16
    verify: Annotated[bool, Flag(help="Compare the file in llama.cpp with transformers.", panel=FORMAT)] = True
