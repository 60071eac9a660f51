"""Shared state of a recovery, and its preparation."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from saap._version import __version__
from saap.core.errors import ConfigurationError, GroupSizeError, SaapError
from saap.core.manifest import RunManifest
from saap.core.records import IntArray, digest_of
from saap.data.samples import leading_ids
from saap.data.texts import GENERAL, KINDS, kind_weights
from saap.data.training import TrainingData, training_data
from saap.discovery.blocks import find_blocks
from saap.export.placing import check_output, check_place, check_source_stays
from saap.models.loading.devices import pick_device, pick_dtype
from saap.models.loading.pretrained import load_config, load_tokenizer, model_without_weights
from saap.models.loading.references import ResolvedModel, resolve_model
from saap.models.structure.routers import find_routers
from saap.models.walk.processes import Processes
from saap.pipeline.shared.dense_model import manifest_of, resolve_dense, tokenizer_with, tokens_of
from saap.pipeline.shared.digests import model_digest
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.meter import Meter
from saap.pipeline.shared.outcome import Behaviour
from saap.pipeline.shared.progress import Reporter, Silent
from saap.pipeline.shared.stages import READ_RECORDS
from saap.pipeline.shared.targets import check_work_outside, is_file, work_path
from saap.pipeline.shared.tokens import EVALUATION, evaluation_sets
from saap.recovery.adapter import require_peft
from saap.settings.recover import RecoverConfig, Tuning

NOT_DECISIVE = {"max_minutes", "patience", "shard", "micro_batch", "gradient_checkpointing", "teacher_logits"}
"""Settings that may change when a training resumes. Whether a folder has the teacher's predictions may not."""
LOGITS_FLAG = "--teacher-logits"
GGUF_LATER = "Write a folder with -o DIR, then use saap export"


@dataclass(frozen=True, slots=True)
class Recovery:
    """A prepared run: everything is checked except what needs the model itself, such as group sizes."""

    config: RecoverConfig
    options: RunOptions
    resolved: ResolvedModel
    tokenizer: Any
    teacher: ResolvedModel | None
    earlier: RunManifest | None
    data: TrainingData
    evaluation: Mapping[str, IntArray]
    leading: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    processes: Processes
    meter: Meter

    @property
    def digest(self) -> str:
        """Digest of what decides the course of the training; another one does not resume it.

        max_steps and max_tokens are in it: the learning rate follows them. max_minutes and patience may change, and so
        may what changes memory or speed, and results by rounding alone. What the model itself writes depends on the
        number of processes.
        """
        settings = self.config.model_dump(mode="json", exclude=NOT_DECISIVE)
        models = [model_digest(one) for one in (self.resolved, self.teacher) if one is not None]
        writers = self.processes.count if self.config.on_policy else 1
        stored = self.config.teacher_logits is not None
        return digest_of([settings, stored, self.data.digest, models, writers, __version__])

    @property
    def evaluation_tokens(self) -> int:
        """Token ids of the evaluation texts."""
        return sum(ids.size for ids in self.evaluation.values())

    def recorded(self) -> tuple[Behaviour | None, Behaviour | None]:
        """Figures of the dense model and of the checkpoint in its manifest, on the same text."""
        earlier = self.earlier
        if earlier is None or earlier.perplexity is None or earlier.answers is None or earlier.recovery is not None:
            return None, None
        found, answers = earlier.perplexity, earlier.answers
        led = bool(earlier.settings.get("bos"))  # without the setting (older manifests), windows began with the text
        other_windows = led is not self.config.bos and bool(leading_ids(self.tokenizer))
        if other_windows or found.text != EVALUATION or found.tokens != self.evaluation_tokens:
            return None, None
        return (
            Behaviour(perplexity=found.before, prompt=answers.prompt, answer=answers.dense),
            Behaviour(perplexity=found.after, prompt=answers.prompt, answer=answers.pruned),
        )


def prepare(source: str, config: RecoverConfig, options: RunOptions, reporter: Reporter) -> Recovery:
    """Check everything that can be checked without the weights. Raises SaapError."""
    if options.out is not None:
        if is_file(options.out):
            raise ConfigurationError(f"-o {options.out} is a GGUF file, and saap recover writes a folder", GGUF_LATER)
        check_work_outside(work_path(options), options.out)
        check_output(options.out, 0, overwrite=options.overwrite)
    check_logits_folder(config, options)
    processes = Processes.found()
    device = processes.device(pick_device(options.device))
    check_processes(config, options, processes.count)
    meter = Meter(reporter if processes.first else Silent(), device)
    with meter.stage(READ_RECORDS):
        resolved = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
        check_tuning(config, resolved)
        dtype = pick_dtype(options.dtype, source=resolved.dtype)
        tokenizer = load_tokenizer(resolved)
        earlier = manifest_of(resolved)
        config, teacher = _with_teacher(config, resolved, earlier, tokenizer, meter)
        for one in (resolved, teacher):
            if one is not None and options.out is not None:
                check_source_stays(one.path, options.out)
        data = read_data(config, tokenizer, known_kinds(earlier))
    return Recovery(
        config=config, options=options, resolved=resolved, tokenizer=tokenizer, teacher=teacher, earlier=earlier,
        data=data, evaluation=evaluation_sets(tokenizer, GENERAL),
        leading=leading_ids(tokenizer, bos=config.bos), device=device,
        dtype=dtype, processes=processes, meter=meter,
    )  # fmt: skip


def read_data(config: RecoverConfig, tokenizer: Any | None, kinds: Collection[str] = KINDS) -> TrainingData:
    """The training data of a recovery. kinds: of text in `mixed`. Raises TrainingDataError, CalibrationError."""
    return training_data(
        config.data, tokenizer, length=config.length, held_out=config.validation_samples, seed=config.seed,
        bos=config.bos, kinds=kinds,
    )  # fmt: skip


def known_kinds(earlier: RunManifest | None) -> Collection[str]:
    """The kinds of text that the dense model predicts well enough to teach them, as the pruning has measured it."""
    measured = {one.text: one.bits_per_byte for one in (() if earlier is None else earlier.kinds)}
    weights = kind_weights({kind: bits for kind, bits in measured.items() if bits is not None})
    return [kind for kind, weight in weights.items() if weight]


def check_logits_folder(config: RecoverConfig, options: RunOptions) -> None:
    """Raise ConfigurationError, OutputError for a --teacher-logits that could not be written or kept."""
    folder = config.teacher_logits
    if folder is None:
        return
    for taken in (options.out, work_path(options)):
        if taken is not None and folder.resolve().is_relative_to(taken.resolve()):
            raise ConfigurationError(f"{LOGITS_FLAG} {folder} would be in {taken}", "Specify a folder outside of it")
    if not folder.is_dir():
        check_place(folder, 0, LOGITS_FLAG)
        if folder.exists():
            raise ConfigurationError(f"{LOGITS_FLAG} {folder} is not a folder", "Specify another one")


def check_early(config: RecoverConfig, resolved: ResolvedModel, options: RunOptions) -> None:
    """Raise SaapError for a recovery that is impossible however the model is pruned before it."""
    check_processes(config, options, Processes.found().count)
    check_tuning(config, resolved)
    hidden = getattr(load_config(resolved).get_text_config(), "hidden_size", None)
    if hidden is not None and config.tuning is Tuning.GROUPWISE and hidden % config.group_size:
        raise GroupSizeError(
            f"The tuning quantises in groups of {config.group_size}, which do not divide the hidden size {hidden}",
            "Prune without it, and use `saap recover` with another --group-size later",
        )


def check_tuning(config: RecoverConfig, resolved: ResolvedModel) -> None:
    """Raise SaapError if a package or the model lacks what the tuning needs."""
    if config.tuning is Tuning.LORA:
        require_peft()
    if config.tuning is Tuning.ROUTER:
        skeleton = model_without_weights(resolved)
        find_routers(skeleton, find_blocks(skeleton))


def check_processes(config: RecoverConfig, options: RunOptions, count: int) -> None:
    """Raise ConfigurationError for settings that this number of processes does not support."""
    if count > 1 and options.out is None and options.work_dir is None:
        raise ConfigurationError("Several processes need a shared folder", "Specify one with --work-dir or -o")
    if count > config.batch:
        offender = f"--batch-size {config.batch} is less than the {count} processes that share each batch"
        raise ConfigurationError(offender, f"Use --batch-size {count}, or a multiple of it")
    if config.shard and count == 1:
        remedy = "Start it with torchrun --nproc-per-node N -m saap recover ..., or leave out --shard"
        raise ConfigurationError("--shard splits weights over several processes, and there is one", remedy)
    if config.shard and config.batch % count:
        offender = f"--batch-size {config.batch} is not a multiple of the {count} processes"
        raise ConfigurationError(f"{offender}, which need equal work with --shard", f"Use a multiple of {count}")


def _with_teacher(
    config: RecoverConfig, resolved: ResolvedModel, earlier: RunManifest | None, tokenizer: Any, meter: Meter
) -> tuple[RecoverConfig, ResolvedModel | None]:
    """The settings with teacher and distillation filled in, and the dense model if it is needed.

    The default teacher is the model that the checkpoint was pruned from, if it is on this machine: nothing is
    downloaded. A model that was only tuned has none: its source knows less than it does. Raises ConfigurationError for
    requested distillation without a teacher.
    """
    teacher = None
    only_tuned = earlier is not None and earlier.parameters.before == earlier.parameters.after
    if config.teacher is not None or (config.distillation != 0 and not only_tuned):
        try:
            teacher = resolve_dense(config, earlier)
            own = None if teacher is None or tokenizer is None else tokenizer_with(teacher, tokens_of(resolved))
            if teacher is not None and own is not None and own.get_vocab() != tokenizer.get_vocab():
                offender = f"--dense {teacher.source} has another vocabulary than {resolved.source}"
                raise ConfigurationError(offender, "Specify the model that it was pruned from")
        except SaapError as error:
            if config.teacher is not None:
                raise
            teacher = None
            meter.reporter.note(f"no distillation from the dense model: {error}")
    share = config.distillation
    if teacher is None:
        if share:
            raise ConfigurationError("--distillation has no teacher", "Specify the dense model with --dense MODEL")
        for flag, given in (("--on-policy", config.on_policy), ("--teacher-logits", config.teacher_logits)):
            if given:
                raise ConfigurationError(f"{flag} has no teacher", "Specify the dense model with --dense MODEL")
        return config.model_copy(update={"teacher": None, "dense_revision": None, "distillation": 0.0}), None
    known = {"teacher": teacher.source, "dense_revision": teacher.revision}
    return config.model_copy(update={**known, "distillation": 1.0 if share is None else share}), teacher
