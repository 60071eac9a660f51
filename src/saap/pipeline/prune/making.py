"""Carrying out a plan: a copy of the dense model is cut, restored, checked, and kept in the work folder."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saap.baselines.baseline import add_biases
from saap.core.errors import VerificationError
from saap.core.manifest import BaseModelIdentity, Change, RunManifest, recorded_versions, typed_command
from saap.core.records import FloatArray, ImportanceScores, Layout, StructurePlan, count_parameters
from saap.discovery.blocks import find_blocks
from saap.export.huggingface import CheckpointParts, write_checkpoint
from saap.export.model_card import licence_of
from saap.models.checkpoint import modeling_pruned
from saap.models.checkpoint.pruned_structure import PrunedStructure, mark_pruned, structure_of
from saap.models.loading.devices import copied, quick_products, spread_over
from saap.models.loading.pretrained import load, load_offloaded
from saap.models.loading.references import resolve_model
from saap.models.walk.offload import offloaded
from saap.pipeline.prune.baselines import biases_for
from saap.pipeline.prune.planning import read_whole_plan
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.memory import restoration_spill
from saap.pipeline.shared.stages import CUT
from saap.pipeline.shared.targets import Target
from saap.pipeline.shared.tokens import chooses_units
from saap.surgery.cut import cut
from saap.surgery.reconstruct import ReconstructionSettings, reconstruct


@dataclass(slots=True)
class Made:
    """A model that was cut and restored. model: None where it lies in the work folder, to be opened later."""

    plan: StructurePlan
    base_model_type: str
    model: nn.Module | None = None
    refit_errors: Mapping[str, float] = field(default_factory=dict)


def made_folder(run: Run, target: Target) -> Path:
    """Where the model of a target lies until it is in its place."""
    return run.work.file(CUT.file_of(target.name)).with_suffix("")


def is_made(run: Run, target: Target) -> bool:
    """Whether an interrupted run has finished the target's model."""
    return (made_folder(run, target) / "config.json").exists() and run.work.file(CUT.file_of(target.name)).exists()


def read_made(run: Run, target: Target) -> Made:
    """The target's model that an interrupted run has finished."""
    record: dict[str, Any] = run.work.read_json(CUT.file_of(target.name)) or {}
    return Made(plan=read_whole_plan(run, made_folder(run, target) / "saap" / "plan.json"), **record)


def manifest_of_run(run: Run, plan: StructurePlan, scores: ImportanceScores) -> RunManifest:
    """The manifest of a result that has not been measured."""
    graph, itemsize, folder = run.graph, run.loaded.dtype.itemsize, run.loaded.folder
    digests = {
        "graph": graph.digest, "calibration": run.tokens.scored.digest, "scores": scores.digest, "plan": plan.digest,
    }  # fmt: skip
    if plan.layout is Layout.ADAPTIVE:
        digests["modeling_code"] = hashlib.sha256(Path(modeling_pruned.__file__).read_bytes()).hexdigest()
    licence = licence_of(folder) if folder is not None else None
    return RunManifest(
        base=BaseModelIdentity(**dataclasses.asdict(graph.model), licence=licence),
        command=typed_command(), settings=run.config.model_dump(mode="json"), seed=run.config.seed,
        layout=plan.layout, device=str(run.device), dtype=str(run.loaded.dtype).removeprefix("torch."),
        versions=recorded_versions(), digests=digests, stages=tuple(run.meter.stages),
        parameters=Change(before=graph.parameters, after=plan.parameters),
        block_parameters=Change(before=graph.block_parameters, after=plan.block_parameters),
        bytes=Change(before=graph.parameters * itemsize, after=plan.parameters * itemsize),
    )  # fmt: skip


def make_model(
    run: Run, target: Target, plan: StructurePlan, scores: ImportanceScores,
    token_scores: Mapping[str, FloatArray] | None = None,
) -> Made:  # fmt: skip
    """The model of one target; where the dense one is not needed any more, that is changed in place."""
    model = _dense_copy(run, target)
    plan, errors = cut_and_restore(run, model, plan, scores, token_scores)
    structure = structure_of(model, run.graph, plan)
    if plan.layout is Layout.ADAPTIVE and target.folder is None and hasattr(model, "save_pretrained"):
        mark_pruned(model, structure)
    _check_count(run, model, plan, structure)
    made = Made(plan=plan, base_model_type=structure.base_model_type, model=model, refit_errors=dict(errors))
    if target.folder is not None and run.processes.first:
        _round_weights(model, run.loaded.dtype)  # so that what is measured is what is written
        parts = CheckpointParts(
            graph=run.graph, plan=plan, structure=structure, manifest=manifest_of_run(run, plan, scores),
            scores=scores, tokenizer=run.loaded.tokenizer, source_folder=run.loaded.folder,
        )  # fmt: skip
        write_checkpoint(model, parts, made_folder(run, target), dtype=run.loaded.dtype, overwrite=True)
        record = {"base_model_type": made.base_model_type, "refit_errors": made.refit_errors}
        run.work.write_json(CUT.file_of(target.name), record)
    return made


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
    run: Run, model: nn.Module, plan: StructurePlan, scores: ImportanceScores,
    token_scores: Mapping[str, FloatArray] | None = None,
) -> tuple[StructurePlan, Mapping[str, float]]:  # fmt: skip
    """Carry out the plan on `model`, a dense one, in place.

    token_scores: the importance that the choice of units weighs in, in place of the element-wise scores.
    Returns the plan with the units that were kept in the end, and the held-out errors of the reconstruction.
    """
    errors: Mapping[str, float] = {}
    biases = run.processes.broadcast_result(lambda: biases_for(run, model, plan))
    if run.config.restore and not plan.removes_nothing(run.graph):
        settings = ReconstructionSettings(second_order=False)
        if chooses_units(run.config) and run.config.effort_settings.second_order:
            element = {name: group.element for name, group in scores.groups.items()}
            settings = ReconstructionSettings(scores=element | dict(token_scores or {}))
        spill = restoration_spill(run.loaded, run.config, run.work.file("spill"))
        products = quick_products(run.device, run.loaded.dtype)
        backend = dataclasses.replace(run.backend, model=model, spill=spill, products=products)
        tokens = run.tokens.tensor("refit", run.device)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(run.config.seed))
        with run.tokens.images(model):
            reconstruction = reconstruct(backend, plan, tokens[order.to(tokens.device)], settings)
        keep = {name: reconstruction.keep.get(name, kept) for name, kept in plan.keep.items()}
        plan, errors = dataclasses.replace(plan, keep=keep), reconstruction.errors
    cut(model, run.graph, plan)
    added = add_biases(model, biases)
    if added:
        run.meter.reporter.note(f"{added:,} parameters of compensating biases come on top of the plan")
    return plan, errors


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
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))


def open_result(run: Run, folder: Path) -> nn.Module:
    """Open a written result to compute in the run's type; its weights stay in the files if the dense ones did."""
    compute, places = next(run.loaded.model.parameters()).dtype, spread_over(run.loaded.model)
    opened: nn.Module = (
        load(folder, device=str(run.device), dtype=compute, device_map=places)
        if run.loaded.fresh is None
        else load_offloaded(resolve_model(folder), find_blocks, device=run.device, dtype=compute)
    )
    return opened
