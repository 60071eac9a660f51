"""The report and the manifest of a recovery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from saap.core.manifest import (
    Answers,
    BaseModelIdentity,
    Change,
    RecoveryRecord,
    RunManifest,
    recorded_versions,
    typed_command,
)
from saap.core.records import Layout, digest_of
from saap.discovery.blocks import find_blocks
from saap.export.huggingface import entry_bytes, stored_entries
from saap.export.model_card import licence_of
from saap.models.checkpoint.groupwise import GroupwiseWeight
from saap.models.checkpoint.modeling_pruned import MODEL_TYPE
from saap.models.loading.devices import working_dtype
from saap.models.loading.references import read_config
from saap.pipeline.prune.result import load_lines
from saap.pipeline.recover.context import EVALUATION, Recovery
from saap.pipeline.recover.result import RecoverReport, share_closed
from saap.pipeline.shared.digests import weights_digest
from saap.pipeline.shared.outcome import Behaviour
from saap.recovery.train import Training

SUMMARY = {"validation_before", "validation", "best_step", "tokens", "seconds", "stopped_by"}
"""Fields of a Training that report and manifest repeat."""


def left_as_they_are(model: nn.Module) -> tuple[str, ...]:
    """Names of the matrices in the decoder blocks that are no linear layers."""
    inside = tuple(f"{block}." for block in find_blocks(model))
    return tuple(
        name for name, value in model.named_parameters()
        if name.startswith(inside) and value.ndim > 1 and not value.requires_grad
    )  # fmt: skip


def recovery_report(
    run: Recovery, model: Any, training: Training, packed: Mapping[str, GroupwiseWeight],
    measured: Mapping[str, Behaviour],
) -> RecoverReport:  # fmt: skip
    """The report. packed: empty where nothing was quantised. measured: before, recovered; dense, quantised if known."""
    before, after, dense = measured["before"], measured["recovered"], measured.get("dense")
    out = run.options.out
    layout = Layout.ADAPTIVE if model.config.model_type == MODEL_TYPE else Layout.UNIFORM
    entries = stored_entries(model, run.dtype)
    return RecoverReport(
        model=run.source, path=None if out is None else str(out), tuning=str(run.config.tuning),
        bits=run.config.bits if packed else None, group_size=run.config.group_size if packed else None,
        parameters=sum(torch.Size(entry.shape).numel() for entry in entries.values()), bytes=entry_bytes(entries),
        packed_bytes=sum(weight.nbytes for weight in packed.values()) if packed else None,
        dtype=str(run.dtype).removeprefix("torch."), evaluation_text=EVALUATION,
        evaluation_tokens=int(run.evaluation.size), perplexity_dense=None if dense is None else dense.perplexity,
        perplexity_before=before.perplexity,
        perplexity_quantised=measured["quantised"].perplexity if "quantised" in measured else None,
        perplexity=after.perplexity,
        gap_closed=None if dense is None else share_closed(dense.perplexity, before.perplexity, after.perplexity),
        **training.model_dump(include=SUMMARY), steps=training.step, prompt=before.prompt,
        answer_dense=None if dense is None else dense.answer, answer_before=before.answer, answer=after.answer,
        stages=tuple(run.meter.stages), load_lines=() if out is None else load_lines(out, str(layout)),
    )  # fmt: skip


def recovery_manifest(
    run: Recovery, model: Any, training: Training, report: RecoverReport, measured: Mapping[str, Behaviour]
) -> RunManifest:
    """The manifest of the model that was tuned, with the record of this recovery."""
    record = RecoveryRecord(
        command=typed_command(),
        settings=run.config.model_dump(mode="json"), data=run.data.sources, data_digest=run.data.digest,
        examples=len(run.data.train), held_examples=len(run.data.held_out), processes=run.processes.count,
        device=str(run.device), dtype=str(working_dtype(run.device, run.resolved.dtype)).removeprefix("torch."),
        versions=recorded_versions(),
        stages=tuple(run.meter.stages),
        curve=tuple(training.points),
        **training.model_dump(include=SUMMARY), packed_bytes=report.packed_bytes,
        left_as_they_are=() if report.packed_bytes is None else left_as_they_are(model),
        evaluation=report.evaluation_text, evaluation_tokens=report.evaluation_tokens,
        perplexity={name: one.perplexity for name, one in measured.items()},
    )  # fmt: skip
    answers = Answers(
        prompt=report.prompt, dense=report.answer_dense or "", pruned=report.answer_before, recovered=report.answer
    )
    earlier = run.earlier if run.earlier is not None else _plain_manifest(run, report)
    return earlier.model_copy(update={"recovery": record, "answers": answers, "dtype": report.dtype})


def _plain_manifest(run: Recovery, report: RecoverReport) -> RunManifest:
    """The record of a model that saap had not pruned."""
    resolved = run.resolved
    config = {} if resolved.gguf_file is not None else read_config(resolved.folder)
    same = Change(before=report.parameters, after=report.parameters)
    size = Change(before=report.bytes, after=report.bytes)
    return RunManifest(
        base=BaseModelIdentity(
            source=run.source, revision=run.options.revision, config_digest=digest_of(config),
            weights_digest=weights_digest(resolved), licence=licence_of(resolved.folder),
        ),
        settings={}, seed=run.config.seed, layout=Layout.UNIFORM, device=str(run.device), dtype=report.dtype,
        versions=recorded_versions(), digests={}, parameters=same, block_parameters=same, bytes=size,
    )  # fmt: skip
