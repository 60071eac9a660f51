"""From a cut model to a result: keep it safe, measure it, write its records, put it in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from saap.core.errors import VerificationError, first_line
from saap.core.manifest import (
    Answers,
    BaseModelIdentity,
    Change,
    PerplexityChange,
    RunManifest,
    SpeedRecord,
    recorded_versions,
    typed_command,
)
from saap.core.records import ImportanceScores, Layout, StructurePlan, count_parameters
from saap.core.storage import read_plan
from saap.evaluation.perplexity import model_logits
from saap.export.huggingface import CheckpointParts, modeling_code_digest, write_checkpoint, write_records
from saap.export.model_card import licence_of
from saap.models.checkpoint.differences import PrunedStructure, auto_class_name, dense_shapes
from saap.models.walk.offload import offloaded
from saap.pipeline.prune.result import PruneReport, PruneResult, load_lines, structure_of
from saap.pipeline.prune.speed_target import diagnose_speed, reached_speed
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.diagnosis import diagnose_importance, diagnose_memory, diagnose_result, diagnose_search
from saap.pipeline.shared.memory import forget_changed, forget_weights, open_result, release
from saap.pipeline.shared.outcome import Behaviour, observe
from saap.pipeline.shared.stages import CUT, MEASURE, TIME_RESULT
from saap.pipeline.shared.targets import Target, finished_report, place_finished
from saap.structure_search.budget import TimeBudget
from saap.structure_search.plan import complete_plan

CHECKED_TOKENS = 64


@dataclass(slots=True)
class Made:
    """A model that was cut and restored. model: None where it was found in the work folder, to be opened later."""

    plan: StructurePlan
    base_model_type: str
    model: nn.Module | None
    refit_errors: Mapping[str, float] = field(default_factory=dict)


def _folder(run: Run, target: Target) -> Path:
    """Where the model of a target lies until it is in its place."""
    return run.work.file(CUT.file_of(target.name)).with_suffix("")


def find_made(run: Run, target: Target) -> Made | None:
    """The target's model in the work folder, if an interrupted run had finished it."""
    record = run.work.read_json(CUT.file_of(target.name))
    folder = _folder(run, target)
    if record is None or not (folder / "config.json").exists():
        return None
    plan = complete_plan(run.graph, read_plan(folder / "saap" / "plan.json", run.graph))
    return Made(plan=plan, base_model_type=record["base_model_type"], model=None, refit_errors=record["refit_errors"])


def keep_made(
    run: Run, target: Target, model: nn.Module, plan: StructurePlan, structure: PrunedStructure,
    refit_errors: Mapping[str, float], scores: ImportanceScores,
) -> Made:  # fmt: skip
    """Check the parameter count and, where the result is to be written, write it into the work folder.

    The weights are rounded to the written type, so that what is measured is what is written.
    """
    new = set(structure.added_biases) - set(dense_shapes(run.graph, plan))
    counted = count_parameters({name: tuple(p.shape) for name, p in model.named_parameters() if name not in new})
    if counted != plan.parameters:
        raise VerificationError(
            f"The pruned model has {counted:,} parameters, but the plan predicts {plan.parameters:,}",
            "Report this model and command as a fault of saap",
        )
    made = Made(plan=plan, base_model_type=structure.base_model_type, model=model, refit_errors=refit_errors)
    if target.folder is not None and run.processes.first:
        round_weights(model, run.loaded.dtype)
        parts = CheckpointParts(
            graph=run.graph, plan=plan, structure=structure, manifest=_manifest(run, plan, scores, None),
            scores=scores, tokenizer=run.loaded.tokenizer, source_folder=run.loaded.folder,
        )  # fmt: skip
        write_checkpoint(model, parts, _folder(run, target), dtype=run.loaded.dtype, overwrite=True)
        record = {"base_model_type": structure.base_model_type, "refit_errors": dict(refit_errors)}
        run.work.write_json(CUT.file_of(target.name), record)
    return made


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the floating-point weights to the values that `dtype` can hold, in place, without changing their type."""
    away = offloaded(model)
    if away is not None:
        away.round_to(dtype)
    for parameter in model.parameters() if away is None else away.always_onloaded(model):
        if parameter.dtype.is_floating_point and parameter.dtype != dtype:
            parameter.copy_(parameter.to(dtype).to(parameter.dtype))


def finish(run: Run, target: Target, made: Made, scores: ImportanceScores, dense: Behaviour) -> PruneResult:
    """Measure the result, complete its records and put it in its place."""
    written = _folder(run, target) if target.folder is not None else None
    with run.meter.stage(MEASURE):
        model = made.model
        if written is not None:
            expected = None if model is None else _few_logits(run, model)
            if model is not None:
                release(model)
            if model is run.loaded.model and run.loaded.fresh is None:
                forget_weights(model)  # the run holds it to its end
            made.model = model = None
            forget_changed(run, target.name)
            model = open_result(run, written)
            _check_same(expected, _logits_of_written(run, model, target), target)
        if model is None:
            raise VerificationError("The pruned model is neither in memory nor in the work folder", "Run again")
        pruned = observe(model, run.loaded.tokenizer, run.tokens, run.spill)
    speed = None
    if isinstance(target.budget, TimeBudget):
        with run.meter.stage(TIME_RESULT):
            speed = reached_speed(run, target.budget, made.plan, model)
    report = _report(run, target, made, scores, (dense, pruned), speed)
    if written is not None and target.folder is not None:
        write_records(written, _manifest(run, made.plan, scores, (dense, pruned), speed), made.base_model_type)
        place_finished(run.work, target, written, report.as_dict())
        if offloaded(model) is not None:
            model = open_result(run, target.folder)  # its files have another place now
    return PruneResult(model=model, plan=made.plan, report=report, path=target.folder)


def find_finished(run: Run, target: Target) -> PruneResult | None:
    """The target's result, if an interrupted run had already put it in its place."""
    saved = finished_report(run.work, target)
    if saved is None or target.folder is None:
        return None
    report = PruneReport.model_validate(saved)
    plan = complete_plan(run.graph, read_plan(target.folder / "saap" / "plan.json", run.graph))
    model = open_result(run, target.folder)
    return PruneResult(model=model, plan=plan, report=report, path=target.folder)


@torch.no_grad()
def _few_logits(run: Run, model: nn.Module) -> torch.Tensor:
    tokens = run.tokens.tensor("held", run.device)[:1, :CHECKED_TOKENS]
    return model_logits(model, tokens).float()


def _logits_of_written(run: Run, model: nn.Module, target: Target) -> torch.Tensor:
    try:
        return _few_logits(run, model)
    except Exception as error:  # the code of its class
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise VerificationError(
            f"The written model ({target.name}) does not run ({reason})",
            "Call saap.prune without `out` to keep it in memory, and report this model and command as a fault of saap",
        ) from error


def _check_same(expected: torch.Tensor | None, found: torch.Tensor, target: Target) -> None:
    if not bool(found.isfinite().all()):
        raise VerificationError(
            f"The written model ({target.name}) gives logits that are not finite", "Use --dtype float32"
        )
    if expected is not None and not torch.allclose(expected, found, rtol=1e-3, atol=1e-3):
        raise VerificationError(
            f"The written model ({target.name}) does not compute what the one in memory does",
            "Report this model and command as a fault of saap",
        )


def _manifest(
    run: Run,
    plan: StructurePlan,
    scores: ImportanceScores,
    behaviour: tuple[Behaviour, Behaviour] | None,
    speed: SpeedRecord | None = None,
) -> RunManifest:
    itemsize = run.loaded.dtype.itemsize
    folder = run.loaded.folder
    perplexity = answers = None
    if behaviour is not None:
        dense, pruned = behaviour
        answers = Answers(prompt=dense.prompt, dense=dense.answer, pruned=pruned.answer)
        perplexity = PerplexityChange(
            text=run.tokens.evaluation_name,
            tokens=int(run.tokens.evaluation.size),
            before=dense.perplexity,
            after=pruned.perplexity,
        )
    digests = {
        "graph": run.graph.digest, "calibration": run.tokens.scored.digest,
        "scores": scores.digest, "plan": plan.digest,
    }  # fmt: skip
    if plan.layout is Layout.ADAPTIVE:
        digests["modeling_code"] = modeling_code_digest()
    return RunManifest(
        base=BaseModelIdentity.of(run.graph.model, licence_of(folder) if folder is not None else None),
        command=typed_command(),
        settings=run.config.model_dump(mode="json"),
        seed=run.config.seed,
        layout=plan.layout,
        device=str(run.device),
        dtype=str(run.loaded.dtype).removeprefix("torch."),
        versions=recorded_versions(),
        digests=digests,
        stages=tuple(run.meter.stages),
        parameters=Change(before=run.graph.parameters, after=plan.parameters),
        block_parameters=Change(before=run.graph.block_parameters, after=plan.block_parameters),
        bytes=Change(before=run.graph.parameters * itemsize, after=plan.parameters * itemsize),
        perplexity=perplexity,
        answers=answers,
        speed=speed,
    )


def _report(
    run: Run,
    target: Target,
    made: Made,
    scores: ImportanceScores,
    behaviour: tuple[Behaviour, Behaviour],
    speed: SpeedRecord | None,
) -> PruneReport:
    graph, plan, (dense, pruned) = run.graph, made.plan, behaviour
    itemsize = run.loaded.dtype.itemsize
    findings = [
        *diagnose_importance(scores),
        *diagnose_search(plan.trail),
        *diagnose_result(graph, plan, pruned.perplexity / dense.perplexity, made.refit_errors, run.config.restore),
        *diagnose_speed(speed),
        *diagnose_memory(run.meter.stages, graph.parameters * itemsize),
    ]
    return PruneReport(
        model=graph.model.source,
        path=None if target.folder is None else str(target.folder),
        target=target.name,
        layout=str(plan.layout),
        strategy=plan.strategy,
        seed=run.config.seed,
        pruning_ratio=1 - plan.block_parameters / graph.block_parameters,
        parameters_dense=graph.parameters,
        parameters=plan.parameters,
        block_parameters_dense=graph.block_parameters,
        block_parameters=plan.block_parameters,
        bytes_dense=graph.parameters * itemsize,
        bytes=plan.parameters * itemsize,
        dtype=str(run.loaded.dtype).removeprefix("torch."),
        evaluation_text=run.tokens.evaluation_name,
        evaluation_tokens=int(run.tokens.evaluation.size),
        perplexity_dense=dense.perplexity,
        perplexity=pruned.perplexity,
        prompt=dense.prompt,
        answer_dense=dense.answer,
        answer=pruned.answer,
        speed=None if speed is None else speed.model_dump(),
        structure=structure_of(graph, plan),
        trail=plan.trail,
        refit_errors=dict(made.refit_errors),
        findings=tuple(findings),
        stages=tuple(run.meter.stages),
        load_lines=()
        if target.folder is None
        else load_lines(target.folder, str(plan.layout), auto_class_name(made.base_model_type)),
    )
