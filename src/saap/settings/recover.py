"""Settings of `saap recover`, with the reasons for their defaults."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from saap.core.errors import ConfigurationError
from saap.settings.prune import BOS
from saap.settings.setting import AtLeast1, Filled, Flag, Positive, Seed, Settings, Source, Texts, one_of, require_none

DEFAULT_MINUTES = 20.0
LEGAL_BITS = (2, 3, 4, 8)
LEGAL_GROUP_SIZES = (16, 32, 64, 128)
data_flag = partial(Flag, panel="Data")
quantised_flag = partial(Flag, panel="Adapters and quantised weights")
teacher_flag = partial(Flag, panel="Teacher")
training_flag = partial(Flag, panel="Training")
stop_flag = partial(Flag, panel="End and validation")
DENSE_REVISION = "Branch, tag or commit of the dense model."
DENSE_CODE = "Run code that the dense model's repository ships."


class Tuning(StrEnum):
    """Trained parameters of the recovery: adapters on quantised weights, plain LoRA, all weights, or only routers."""

    GROUPWISE = "groupwise"
    LORA = "lora"
    FULL = "full"
    ROUTER = "router"


class RecoverConfig(Settings):
    """Everything that decides the result of `saap recover`, checked before any model is loaded.

    batch: one sequence, since in twenty minutes many small steps learn more than a quarter as many steps of four
    sequences (SmolLM2). alpha and length: usual values, not tuned. The first limit that is reached ends the training;
    without limits it is DEFAULT_MINUTES. teacher: None for the dense model that the checkpoint was pruned from, if it
    is on this machine. distillation: None for 1 with a teacher and 0 without. shard does not change the result.
    """

    data: Annotated[
        Texts, Filled, data_flag("Training data, repeatable: .txt, .jsonl with text, instructions or chats.")
    ] = ("mixed",)
    tuning: Annotated[
        Tuning,
        quantised_flag(
            "groupwise: adapters on quantised weights; in full precision, lora: plain LoRA, full: all weights of the "
            "blocks, router: only the routers of experts.",
            aliases=("tune",),
        ),
    ] = Tuning.GROUPWISE
    bits: Annotated[int, one_of(*LEGAL_BITS), quantised_flag("Bits of a weight: 2, 3, 4 or 8.")] = 4
    group_size: Annotated[
        int,
        one_of(*LEGAL_GROUP_SIZES),
        quantised_flag("Inputs that share a scale and a zero point: 16, 32, 64 or 128."),
    ] = 32
    error_feedback: Annotated[
        bool,
        quantised_flag("Quantise by GPTQ: later columns compensate for the rounding of earlier ones; for short runs."),
    ] = False
    rank: Annotated[AtLeast1, quantised_flag("Rank of the adapters.")] = 16
    alpha: Annotated[Positive, quantised_flag("The adapters' product is scaled by alpha / rank.")] = 16.0
    scales: Annotated[bool, quantised_flag("Learn the scales besides the zero points.")] = True
    teacher: Annotated[
        Source | None,
        teacher_flag(
            "The dense model as teacher.", name="dense", metavar="MODEL", default="what MODEL was pruned from"
        ),
    ] = None
    dense_revision: Annotated[str | None, teacher_flag(DENSE_REVISION, default="as MODEL's manifest says")] = None
    dense_trust_remote_code: Annotated[bool, teacher_flag(DENSE_CODE)] = False
    distillation: Annotated[
        Annotated[float, Field(ge=0, le=1)] | None,
        teacher_flag("Weight of the divergence from the teacher, 0 to 1.", default="1, without a teacher 0"),
    ] = None
    teacher_logits: Annotated[
        Path | None,
        teacher_flag(
            "Folder of the teacher's top-k log-probabilities: computed once, shared by runs; the teacher is not in "
            "memory while training.",
            metavar="DIR",
            aliases=("teacher_logprobs",),
        ),
    ] = None
    teacher_top_k: Annotated[AtLeast1, teacher_flag("Tokens stored at each position, most probable first.")] = 256
    on_policy: Annotated[
        float,
        Field(ge=0, le=1),
        teacher_flag("Share of the training, at its end, on what the model writes itself after the data's beginnings."),
    ] = 0.0
    length: Annotated[
        int, Field(ge=16), data_flag("Tokens per block; longer conversations are cut.", name="max_seq_length")
    ] = 512
    bos: Annotated[bool, data_flag(BOS)] = True
    batch: Annotated[AtLeast1, training_flag("Sequences per step, over all processes.", name="batch_size")] = 1
    micro_batch: Annotated[AtLeast1, training_flag("Sequences computed at once.", name="micro_batch_size")] = 1
    learning_rate: Annotated[
        Positive | None,
        training_flag("Peak learning rate.", default="by the size of the weights; 0.001 for --tuning router"),
    ] = None
    warm_up: Annotated[
        float,
        Field(ge=0, lt=1),
        training_flag("Share of the training in which the learning rate rises.", name="warmup_ratio"),
    ] = 0.05
    clip: Annotated[Positive, training_flag("Gradients are clipped to this norm.", name="max_grad_norm")] = 1.0
    max_steps: Annotated[AtLeast1 | None, stop_flag("Stop after this many steps.")] = None
    max_tokens: Annotated[AtLeast1 | None, stop_flag("Stop after this many tokens.")] = None
    max_minutes: Annotated[
        Positive | None,
        stop_flag("Stop after this many minutes of training.", default=f"{DEFAULT_MINUTES:g} without a limit"),
    ] = None
    validate_every: Annotated[AtLeast1, stop_flag("Steps between two validations; the state is saved then.")] = 60
    validation_samples: Annotated[AtLeast1, stop_flag("Sequences that are held out for validation.")] = 8
    patience: Annotated[
        int, Field(ge=0), stop_flag("Stop after this many validations without a new best; 0: never.")
    ] = 5
    gradient_checkpointing: Annotated[
        bool | None,
        training_flag("Recompute activations, or keep them all: faster.", default="kept if the memory suffices"),
    ] = None
    exact_products: Annotated[bool, training_flag("Train in full float32 on the CPU too: slower.")] = False
    shard: Annotated[bool, training_flag("Split frozen weights over the processes (FSDP): slower, less memory.")] = (
        False
    )
    seed: Annotated[Seed, training_flag("Seed of every random choice.")] = 0

    @model_validator(mode="after")
    def _check_tuning(self) -> Self:
        quantised = " and ".join(self.flags_given("bits", "group_size", "error_feedback", "scales", "shard"))
        adapters = " and ".join(self.flags_given("rank", "alpha"))
        faults = (
            (
                quantised and self.tuning is not Tuning.GROUPWISE,
                f"--tuning {self.tuning} has no quantised layers for {quantised}",
                f"Leave out {quantised}, or use --tuning groupwise",
            ), (
                adapters and self.tuning in (Tuning.FULL, Tuning.ROUTER),
                f"--tuning {self.tuning} has no adapters for {adapters}",
                f"Leave out {adapters}, or use --tuning groupwise or lora",
            ), (
                self.on_policy and self.distillation not in (None, 1),
                "--on-policy requires --distillation 1", "Leave out one of the two",
            ), (
                self.on_policy and self.shard,
                "--on-policy cannot be combined with --shard", "Leave out one of the two",
            ), (
                self.flags_given("teacher_top_k") and self.teacher_logits is None,
                "--teacher-top-k has no effect without --teacher-logits", "Add it, or leave both out",
            ), (
                self.teacher_logits is not None and self.distillation == 0,
                "--distillation 0 reads no --teacher-logits", "Leave out one of the two",
            ), (
                self.teacher_logits is not None and self.on_policy,
                "--teacher-logits cannot be combined with --on-policy, whose text is not known before",
                "Leave out one of the two",
            ), (
                self.flags_given("micro_batch") and self.micro_batch > self.batch,
                f"--micro-batch-size {self.micro_batch} is more than --batch-size {self.batch}",
                "Raise --batch-size, or leave --micro-batch-size out",
            ), (
                self.distillation == 0 and self.teacher is None and self.dense_revision is not None,
                "--dense-revision has no teacher with --distillation 0", "Leave out one of the two",
            ), (
                self.teacher_logits is not None and self.max_steps is None and self.max_tokens is None,
                "--teacher-logits needs a limit in tokens or steps", "Add --max-tokens or --max-steps",
            ),
        )  # fmt: skip
        require_none(faults)
        return self

    @property
    def minutes(self) -> float | None:
        """The limit in minutes; the default if no limit of any kind was given."""
        no_limit = self.max_steps is None and self.max_tokens is None and self.max_minutes is None
        return DEFAULT_MINUTES if no_limit else self.max_minutes


def check_alignment(align: int, config: RecoverConfig, name: str = "--align") -> None:
    """Check that the weight groups of a recovery, if it has any, divide the kept sizes.

    name: of the alignment. Raises ConfigurationError.
    """
    if config.tuning is Tuning.GROUPWISE and align % config.group_size:
        raise ConfigurationError(
            f"{name} {align} leads to sizes that groups of {config.group_size} do not divide",
            f"Use {name} {config.group_size} or a multiple of it",
        )
