"""Carrying out a plan: a copy of the dense model is cut, restored, checked, and kept in the work folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from saap.baselines.baseline import add_biases
from saap.core.errors import VerificationError
from saap.core.manifest import BaseModelIdentity, Change, RunManifest, recorded_versions, typed_command
from saap.core.records import ImportanceScores, Layout, StructurePlan, count_parameters, digest_of
from saap.discovery.blocks import find_blocks
from saap.export.huggingface import CheckpointParts, write_checkpoint
from saap.export.model_card import licence_of
from saap.models.checkpoint.pruned_structure import PrunedStructure, mark_pruned, structure_of
from saap.models.loading import memory
from saap.models.loading.devices import copied, quick_products, spread_over
from saap.models.loading.pretrained import load_model, load_offloaded
from saap.models.loading.references import resolve_model
from saap.models.walk.backend import Backend
from saap.models.walk.finished import forget_finished
from saap.models.walk.offload import offloaded
from saap.models.walk.spill import Spill
from saap.pipeline.prune.baselines import biases_for
from saap.pipeline.prune.planning import chosen_scores, read_whole_plan
from saap.pipeline.prune.source_file import stored_bytes, write_source_file
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.memory_limit import restoration_spill
from saap.pipeline.shared.stages import CUT
from saap.pipeline.shared.targets import Target, is_file, records_of
from saap.pipeline.shared.tokens import chooses_units
from saap.surgery.cut import cut
from saap.surgery.distillation import DistillationText, distill
from saap.surgery.held_out import DISTILLED_LENGTH, MICRO_BATCH, divided
from saap.surgery.reconstruct import Reconstruction, ReconstructionSettings, reconstruct


class Restored(BaseModel):
    """How the removal was made up for.

    refit_errors: held-out error of each reconstructed matrix relative to before. distillation: divergence from the
    dense model before and after, in nats per token.
    """

    refit_errors: Mapping[str, float] = {}
    distillation: tuple[float, float] | None = None


ROUNDED_ROWS = 4096
"""Rows of a weight that are rounded at a time."""


@dataclass(slots=True)
class Made:
    """A model that was cut and restored. model: None where it lies in the work folder, to be opened later."""

    plan: StructurePlan
    model: nn.Module | None = None
    restored: Restored = field(default_factory=Restored)


def made_path(run: Run, target: Target) -> Path:
    """Where the model of a target lies until it is in its place: a folder, or a file in it."""
    folder = run.work.file(CUT.file_of(target.name)).with_suffix("")
    return folder / target.path.name if target.path is not None and is_file(target.path) else folder


def is_made(run: Run, target: Target) -> bool:
    """Whether an interrupted run has finished the target's model."""
    made, record = made_path(run, target), run.work.file(CUT.file_of(target.name))
    return record.exists() and (made if is_file(made) else made / "config.json").exists()


def read_made(run: Run, target: Target) -> Made:
    """The target's model that an interrupted run has finished."""
    record: dict[str, Any] = run.work.read_json(CUT.file_of(target.name)) or {}
    plan, restored = read_whole_plan(run, records_of(made_path(run, target)) / "plan.json"), record["restored"]
    return Made(plan, restored=Restored.model_validate(restored))


def manifest_of_run(run: Run, plan: StructurePlan, scores: ImportanceScores | None) -> RunManifest:
    """The manifest of a result that has not been measured."""
    graph, folder = run.graph, run.loaded.folder
    dtype, size = str(run.loaded.dtype).removeprefix("torch."), run.loaded.dtype.itemsize
    stored = Change(before=run.dense_parameters * size, after=plan.parameters * size)
    if run.experts is not None:
        dtype, stored = run.experts.type, stored_bytes(run.experts, graph, plan)
    digests = {"graph": graph.digest, "calibration": run.tokens.scored.digest, "plan": plan.digest}
    if scores is not None:
        digests["scores"] = scores.digest
    licence = licence_of(folder) if folder is not None else None
    return RunManifest(
        base=BaseModelIdentity(**dataclasses.asdict(graph.model), licence=licence),
        command=typed_command(), settings=run.config.model_dump(mode="json"), seed=run.config.seed,
        layout=plan.layout, device=str(run.device), dtype=dtype,
        versions=recorded_versions(), digests=digests, stages=tuple(run.meter.stages),
        parameters=Change(before=run.dense_parameters, after=plan.parameters),
        block_parameters=Change(before=graph.block_parameters, after=plan.block_parameters),
        bytes=stored, vocabulary=None if run.vocabulary is None else run.vocabulary.record,
    )  # fmt: skip


def make_model(run: Run, target: Target, plan: StructurePlan, scores: ImportanceScores | None) -> Made:
    """The model of one target; where the dense one is not needed any more, that is changed in place."""
    model = _dense_copy(run, target)
    plan, restored = cut_and_restore(run, model, plan, scores)
    structure = structure_of(model, run.graph, plan)
    if plan.layout is Layout.ADAPTIVE and target.path is None and hasattr(model, "save_pretrained"):
        mark_pruned(model, structure)
    _check_count(run, model, plan, structure)
    made = Made(plan=plan, model=model, restored=restored)
    if target.path is not None and run.processes.first:
        if run.experts is not None and not run.config.vocabulary_only:
            write_source_file(run, run.experts, made_path(run, target), plan, scores)
        else:
            _write_folder(run, target, model, plan, structure, scores)
        run.work.write_json(CUT.file_of(target.name), {"restored": restored.model_dump()})
    return made


def _write_folder(
    run: Run, target: Target, model: nn.Module, plan: StructurePlan, structure: PrunedStructure,
    scores: ImportanceScores | None,
) -> None:  # fmt: skip
    """Write the model of a target, rounded in place to the values that are written."""
    _round_weights(model, run.loaded.dtype)  # so that what is measured is what is written
    parts = CheckpointParts(
        graph=run.graph, plan=plan, structure=structure, manifest=manifest_of_run(run, plan, scores),
        scores=scores, tokenizer=run.loaded.tokenizer, source_folder=run.loaded.folder,
        vocabulary=None if run.vocabulary is None else run.vocabulary.map,
    )  # fmt: skip
    write_checkpoint(model, parts, made_path(run, target), dtype=run.loaded.dtype, overwrite=True)


def _check_count(run: Run, model: nn.Module, plan: StructurePlan, structure: PrunedStructure) -> None:
    """Raise VerificationError if the model has not the parameters that the plan predicts."""
    new = set(structure.added_biases) - run.graph.renamed(plan.dropped_blocks, run.graph.shapes).keys()
    counted = count_parameters({name: tuple(p.shape) for name, p in model.named_parameters() if name not in new})
    if counted != plan.parameters:
        raise VerificationError(
            f"The pruned model has {counted:,} parameters, but the plan predicts {plan.parameters:,}",
            "Report this model and command as a fault of saap",
        )


def cut_and_restore(
    run: Run, model: nn.Module, plan: StructurePlan, scores: ImportanceScores | None
) -> tuple[StructurePlan, Restored]:
    """Carry out the plan on `model`, a dense one, in place.

    Returns the plan with the units that were kept in the end, and what was made up for their removal.
    """
    biases = run.processes.broadcast_result(lambda: biases_for(run, model, plan))
    restored, text = Restored(), None
    if run.config.restore and not plan.removes_nothing(run.graph):
        plan, reconstruction, text = _reconstructed(run, model, plan, scores)
        restored.refit_errors = reconstruction.errors
    cut(model, run.graph, plan)
    added = add_biases(model, run.graph.renamed(plan.dropped_blocks, biases))
    if added:
        run.meter.reporter.note(f"{added:,} parameters of compensating biases come on top of the plan")
    if text is not None:
        blocks = run.graph.blocks[: len(run.graph.blocks) - len(plan.dropped_blocks)]
        if run.options.out is not None:  # as files of offloaded weights have them by now
            _round_weights(model, run.loaded.dtype)
        memory.give_back()
        with run.tokens.images(model):
            # what it writes is no longer what the record of the reconstruction is about
            restored.distillation = distill(_restoring(run, model, 1), blocks, text, lambda: _forget_record(model))
    return plan, restored


def _forget_record(model: nn.Module) -> None:
    """Have an interrupted run reconstruct again from the first block."""
    weights = offloaded(model)
    if weights is not None and weights.folder is not None:
        forget_finished(weights.folder)


def _restoring(run: Run, model: nn.Module, half: int) -> Backend:
    """How the reconstruction, the first half of a stage, and the distillation, the second, run a model."""

    def progress(done: int, total: int) -> None:
        run.meter.reporter.advance(round(100 * (half + done / total)), 200)

    spill = restoration_spill(run.loaded, run.config, run.work.file("spill"))
    products = quick_products(run.device, run.loaded.dtype)
    return dataclasses.replace(run.backend, model=model, spill=spill, products=products, progress=progress)


def _reconstructed(
    run: Run, model: nn.Module, plan: StructurePlan, scores: ImportanceScores | None
) -> tuple[StructurePlan, Reconstruction, DistillationText]:
    """The plan with its final units, what the reconstruction did, and what is distilled on after it."""
    settings = ReconstructionSettings(second_order=False, merge=run.config.merge_experts)
    if scores is not None and chooses_units(run.config):
        means = {name: score.mean for name, score in chosen_scores(run, scores).items()}
        settings = dataclasses.replace(settings, second_order=True, scores=means)
    tokens = run.tokens.tensor("refit", run.device)
    length = tokens.shape[1] if run.tokens.refit.inputs else DISTILLED_LENGTH  # images belong to whole sequences
    tokens, others, held_out = divided(tokens, run.config.seed, run.tokens.leading, length=length)
    backend, digest = _restoring(run, model, 0), digest_of([plan.digest, run.tokens.refit.digest])
    weights = offloaded(model)
    if weights is not None and weights.folder is not None:
        resumed = partial(run.meter.reporter.note, "the reconstruction resumes after its last finished block")
        backend = dataclasses.replace(backend, spill=Spill(weights.folder, resumed))
    with run.tokens.images(model):
        done = reconstruct(backend, plan, tokens, settings, others, digest)
    keep = {name: done.keep.get(name, kept) for name, kept in plan.keep.items()}
    text = DistillationText(
        tokens=others, teacher=done.dense, held_out=held_out, micro_batch=MICRO_BATCH,
        ignored=run.tokens.refit.ignored, may_keep=run.options.max_memory is None and not run.loaded.spills,
    )  # fmt: skip
    return dataclasses.replace(plan, keep=keep), done, text


def _dense_copy(run: Run, target: Target) -> nn.Module:
    """The dense model for one target to change. One whose weights are in files is opened again."""
    if run.loaded.fresh is None:
        needed_later = target is not run.targets[-1] or run.config.target_speedup is not None
        return run.loaded.model if run.loaded.owned and not needed_later else copied(run.loaded.model)
    release(run.loaded.model)
    model: nn.Module = run.loaded.fresh()
    weights = offloaded(model)
    if weights is not None:
        weights.folder, weights.written = changed_folder(run, target), run.loaded.dtype
    return model


def release(model: nn.Module) -> None:
    """Have no weights of a model in memory that are in files as well: it may outlive its last use."""
    weights = offloaded(model)
    if weights is not None:
        weights.offload()


def changed_folder(run: Run, target: Target) -> Path:
    """Where the changed blocks of a model lie whose weights are in files, until it is written."""
    return run.work.file(f"changed-{target.name}")


@torch.no_grad()
def _round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the floating-point weights to the values that `dtype` can hold, in place, without changing their type."""
    away = offloaded(model)
    if away is not None:
        away.round_to(dtype)
    for parameter in model.parameters() if away is None else away.always_onloaded(model):
        if parameter.dtype.is_floating_point and parameter.dtype != dtype:
            # Some rows at a time: copies of a whole embedding would set the run's peak of memory.
            for rows in torch.split(parameter, ROUNDED_ROWS) if parameter.dim() else (parameter,):
                rows.copy_(rows.to(dtype))


def open_result(run: Run, path: Path) -> nn.Module:
    """Open a written result to compute in the run's type; its weights stay in the files if the dense ones did."""
    compute, places = next(run.loaded.model.parameters()).dtype, spread_over(run.loaded.model)
    resolved = resolve_model(path, trust_remote_code=run.options.trust_remote_code)
    opened: nn.Module = (
        load_model(resolved, device=run.device, dtype=compute, device_map=places)
        if run.loaded.fresh is None
        else load_offloaded(resolved, find_blocks, device=run.device, dtype=compute)
    )
    return opened
