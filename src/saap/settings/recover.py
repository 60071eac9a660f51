"""The settings of `saap recover`: one place for names, defaults and their reasons."""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from saap.core.errors import ConfigurationError
from saap.settings.prune import BOS
from saap.settings.setting import AtLeast1, Flag, Names, Positive, Seed, Settings, one_of

DEFAULT_MINUTES = 20.0
LEGAL_BITS = (2, 3, 4, 8)
LEGAL_GROUP_SIZES = (16, 32, 64, 128)
DATA, QUANTISED, TEACHER, TRAINING, STOP = (
    "Data", "Adapters and quantised weights", "Teacher", "Training", "End and validation",
)  # fmt: skip
DENSE_REVISION = "Branch, tag or commit of the dense model."
DENSE_CODE = "Run code that the dense model's repository ships."


class Tuning(StrEnum):
    """What recovery trains: adapters on quantised weights, or plain LoRA on the weights as they are (reference)."""

    GROUPWISE = "groupwise"
    LORA = "lora"


class RecoverConfig(Settings):
    """Everything that decides the result of `saap recover`, checked before any model is loaded.

    batch: one sequence, since many small steps learn more from the tokens of twenty minutes than a quarter as many of
    four sequences (SmolLM2). alpha and length: usual values, not tuned. The first limit that is reached ends the
    training; with none given it is DEFAULT_MINUTES. teacher: None for the dense model that the checkpoint was pruned
    from, if it is on this machine. distillation: None for 1 where there is a teacher and 0 where there is none.
    shard changes no result.
    """

    data: Annotated[
        tuple[str, ...],
        Names,
        Field(min_length=1),
        Flag(
            help="Text to learn from, repeatable: .txt, .jsonl with text, instructions or chats.", panel=DATA,
            metavar="NAME|FILE", repeat=True,
        ),
    ] = ("mixed",)  # fmt: skip
    tuning: Annotated[
        Tuning,
        Flag(help="groupwise: adapters on quantised weights; lora: plain LoRA in full precision.", panel=QUANTISED),
    ] = Tuning.GROUPWISE
    bits: Annotated[int, one_of(*LEGAL_BITS), Flag(help="Bits of a weight: 2, 3, 4 or 8.", panel=QUANTISED)] = 4
    group_size: Annotated[
        int,
        one_of(*LEGAL_GROUP_SIZES),
        Flag(help="Inputs that share a scale and a zero point: 16, 32, 64 or 128.", panel=QUANTISED),
    ] = 32
    error_feedback: Annotated[
        bool, Flag(help="Quantise by GPTQ: later columns compensate for earlier ones.", panel=QUANTISED)
    ] = False
    rank: Annotated[AtLeast1, Flag(help="Rank of the adapters.", panel=QUANTISED)] = 16
    alpha: Annotated[Positive, Flag(help="The adapters' product is scaled by alpha / rank.", panel=QUANTISED)] = 16.0
    scales: Annotated[bool, Flag(help="Learn the scales besides the zero points.", panel=QUANTISED)] = True
    teacher: Annotated[
        str | None,
        Flag(
            help="The dense model to learn from.", panel=TEACHER, name="dense", metavar="MODEL",
            default="what MODEL was pruned from",
        ),
    ] = None  # fmt: skip
    dense_revision: Annotated[
        str | None, Flag(help=DENSE_REVISION, panel=TEACHER, default="as MODEL's manifest says")
    ] = None
    dense_trust_remote_code: Annotated[bool, Flag(help=DENSE_CODE, panel=TEACHER)] = False
    distillation: Annotated[
        Annotated[float, Field(ge=0, le=1)] | None,
        Flag(
            help="Share of the divergence from the teacher in the loss, 0 to 1.", panel=TEACHER,
            default="1, without a teacher 0",
        ),
    ] = None  # fmt: skip
    length: Annotated[
        int,
        Field(ge=16),
        Flag(help="Tokens of a block of text; longer conversations are cut.", panel=DATA, name="max_seq_length"),
    ] = 512
    bos: Annotated[bool, Flag(help=BOS, panel=DATA)] = True
    batch: Annotated[
        AtLeast1, Flag(help="Sequences of a step, over all processes.", panel=TRAINING, name="batch_size")
    ] = 1
    micro_batch: Annotated[
        AtLeast1, Flag(help="Sequences that are computed at once.", panel=TRAINING, name="micro_batch_size")
    ] = 1
    learning_rate: Annotated[Positive, Flag(help="The highest learning rate.", panel=TRAINING)] = 1e-3
    warm_up: Annotated[
        float,
        Field(ge=0, lt=1),
        Flag(help="Share of the training on which the learning rate rises.", panel=TRAINING, name="warmup_ratio"),
    ] = 0.05
    clip: Annotated[
        Positive, Flag(help="Longer gradients are shortened to this norm.", panel=TRAINING, name="max_grad_norm")
    ] = 1.0
    max_steps: Annotated[AtLeast1 | None, Flag(help="Stop after so many steps.", panel=STOP)] = None
    max_tokens: Annotated[AtLeast1 | None, Flag(help="Read at most so many tokens, then stop.", panel=STOP)] = None
    max_minutes: Annotated[
        Positive | None,
        Flag(
            help="Stop after so many minutes of training.", panel=STOP,
            default=f"{DEFAULT_MINUTES:g} without a limit",
        ),
    ] = None  # fmt: skip
    validate_every: Annotated[
        AtLeast1, Flag(help="Steps between two validations; the state is saved then.", panel=STOP)
    ] = 60
    validation_samples: Annotated[AtLeast1, Flag(help="Sequences that are held out for validation.", panel=STOP)] = 8
    patience: Annotated[
        int,
        Field(ge=0),
        Flag(help="Stop after so many validations without a new best; 0 never.", panel=STOP),
    ] = 5
    gradient_checkpointing: Annotated[
        bool, Flag(help="Compute activations again, or keep them all: quicker, more memory.", panel=TRAINING)
    ] = True
    exact_products: Annotated[bool, Flag(help="Train in full float32 on the CPU too: slower.", panel=TRAINING)] = False
    shard: Annotated[
        bool, Flag(help="Split frozen weights over the processes (FSDP): slower, less memory.", panel=TRAINING)
    ] = False
    seed: Annotated[Seed, Flag(help="Seed of every random choice.", panel=TRAINING)] = 0

    @model_validator(mode="after")
    def _check_tuning(self) -> Self:
        for flag, given in (("--error-feedback", self.error_feedback), ("--shard", self.shard)):
            if given and self.tuning is Tuning.LORA:
                raise ConfigurationError(
                    f"{flag} is about quantised layers, which plain LoRA has not", "Leave out one of the two"
                )
        return self

    @property
    def minutes(self) -> float | None:
        """The limit in minutes; the default where no limit of any kind was given."""
        no_limit = self.max_steps is None and self.max_tokens is None and self.max_minutes is None
        return DEFAULT_MINUTES if no_limit else self.max_minutes
