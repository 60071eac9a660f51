"""Result of a recovery: its report and the manifest of the tuned model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from saap.core.manifest import (
    Answers,
    BaseModelIdentity,
    Change,
    Opening,
    RecoveryRecord,
    RunManifest,
    StageRecord,
    recorded_versions,
    typed_command,
)
from saap.core.records import Layout, digest_of
from saap.discovery.blocks import find_blocks
from saap.export.huggingface import entry_bytes, stored_entries
from saap.export.model_card import licence_of, load_lines
from saap.models.checkpoint.groupwise import GroupwiseWeight
from saap.models.loading.devices import working_dtype
from saap.models.loading.references import read_config
from saap.pipeline.recover.context import Recovery
from saap.pipeline.shared.digests import weights_digest
from saap.pipeline.shared.outcome import Behaviour
from saap.pipeline.shared.tokens import EVALUATION
from saap.recovery.train import Training, gap_closed

SUMMARY = {"validation_before", "validation_teacher", "validation", "best_step", "tokens", "seconds", "stopped_by"}
"""Fields of a Training that are copied to report and manifest."""


class RecoverReport(BaseModel):
    """Figures of a recovery.

    perplexity_before: of the input model; perplexity_quantised: before training, None if nothing was quantised;
    perplexity_dense, answer_dense: of the model that it was pruned from, if known. gap_closed: share of the gap in
    log-perplexity, negative if it grew; None without a gap. bytes: of the plain weights in `dtype`; packed_bytes: of
    integers, scales and zero points. opened: in the programs of `saap prune --check`.
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
    validation_teacher: float | None
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
    opened: tuple[Opening, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return self.model_dump()


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverResult:
    """A tuned model; after a groupwise tuning its linear layers are packed. path: its folder, if written."""

    model: nn.Module
    report: RecoverReport
    training: Training
    path: Path | None


def not_quantised(model: nn.Module) -> tuple[str, ...]:
    """Names of matrices in the decoder blocks that are not tuned: of routers, and outside of linear layers."""
    inside = tuple(f"{block}." for block in find_blocks(model))
    return tuple(
        name for name, value in model.named_parameters()
        if name.startswith(inside) and value.ndim > 1 and not value.requires_grad
    )  # fmt: skip


def recovery_report(
    run: Recovery, model: Any, training: Training, packed: Mapping[str, GroupwiseWeight],
    measured: Mapping[str, Behaviour],
) -> RecoverReport:  # fmt: skip
    """packed: empty if nothing was quantised. measured: before, recovered; dense, quantised if known."""
    config, out = run.config, run.options.out
    entries = stored_entries(model, run.dtype)
    value = {name: one.perplexity for name, one in measured.items()}
    closed = None
    if "dense" in value:
        closed = gap_closed(*(math.log(value[name]) for name in ("dense", "before", "recovered")))
    return RecoverReport(
        model=run.resolved.source, path=None if out is None else str(out), tuning=str(config.tuning),
        bits=config.bits if packed else None, group_size=config.group_size if packed else None,
        parameters=sum(torch.Size(entry.shape).numel() for entry in entries.values()), bytes=entry_bytes(entries),
        packed_bytes=sum(weight.nbytes for weight in packed.values()) if packed else None,
        dtype=str(run.dtype).removeprefix("torch."), evaluation_text=EVALUATION,
        evaluation_tokens=run.evaluation_tokens, perplexity_dense=value.get("dense"),
        perplexity_before=value["before"], perplexity_quantised=value.get("quantised"), perplexity=value["recovered"],
        gap_closed=closed, **training.model_dump(include=SUMMARY), steps=training.step,
        prompt=measured["recovered"].prompt, answer_dense=measured["dense"].answer if "dense" in measured else None,
        answer_before=measured["before"].answer, answer=measured["recovered"].answer, stages=tuple(run.meter.stages),
        load_lines=() if out is None else load_lines(out, model.config.to_dict(), run.resolved.folder),
    )  # fmt: skip


def recovery_manifest(
    run: Recovery, model: Any, training: Training, report: RecoverReport, measured: Mapping[str, Behaviour]
) -> RunManifest:
    """The manifest of the input model, with the record of this recovery and without what held for its files alone."""
    record = RecoveryRecord(
        command=typed_command(), settings=run.config.model_dump(mode="json"), data=run.data.sources,
        data_digest=run.data.digest, examples=len(run.data.train), held_examples=len(run.data.held_out),
        processes=run.processes.count, device=str(run.device),
        dtype=str(working_dtype(run.device, run.resolved.dtype)).removeprefix("torch."), versions=recorded_versions(),
        stages=report.stages, curve=tuple(training.points), **training.model_dump(include=SUMMARY),
        packed_bytes=report.packed_bytes,
        left_as_they_are=() if report.packed_bytes is None else not_quantised(model),
        evaluation=report.evaluation_text, evaluation_tokens=report.evaluation_tokens,
        perplexity={name: one.perplexity for name, one in measured.items()},
    )  # fmt: skip
    answers = Answers(
        prompt=report.prompt, dense=report.answer_dense or "", pruned=report.answer_before, recovered=report.answer
    )
    earlier = run.earlier if run.earlier is not None else _plain_manifest(run, report)
    size = earlier.bytes
    if earlier.dtype != report.dtype:
        counts = earlier.parameters
        size = Change(before=counts.before * run.dtype.itemsize, after=counts.after * run.dtype.itemsize)
    own = {"recovery": record, "answers": answers, "dtype": report.dtype, "bytes": size, "opened": ()}
    return earlier.model_copy(update=own)


def _plain_manifest(run: Recovery, report: RecoverReport) -> RunManifest:
    """A manifest for a model that was not pruned by saap."""
    resolved = run.resolved
    config = {} if resolved.gguf_file is not None else read_config(resolved.folder)
    same, size = (Change(before=count, after=count) for count in (report.parameters, report.bytes))
    return RunManifest(
        base=BaseModelIdentity(
            source=run.resolved.source, revision=run.options.revision, config_digest=digest_of(config),
            weights_digest=weights_digest(resolved), licence=licence_of(resolved.folder),
        ),
        settings={}, seed=run.config.seed, layout=Layout.UNIFORM, device=str(run.device), dtype=report.dtype,
        versions=recorded_versions(), digests={}, parameters=same, block_parameters=same, bytes=size,
    )  # fmt: skip
