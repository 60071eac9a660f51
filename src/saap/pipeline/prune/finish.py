"""From a made model to a result: open what was written, measure it, complete its records, put it in its place."""

from __future__ import annotations

import torch
from torch import nn

from saap.core.errors import VerificationError, first_line
from saap.core.manifest import RunManifest, SpeedRecord
from saap.core.records import ImportanceScores
from saap.evaluation.perplexity import model_logits
from saap.export.huggingface import write_records
from saap.export.model_card import load_lines
from saap.models.checkpoint.pruned_structure import auto_class
from saap.models.walk.offload import offloaded, placeholder
from saap.pipeline.prune.diagnosis import findings_of
from saap.pipeline.prune.making import Made, forget_changed, made_folder, open_result, release
from saap.pipeline.prune.planning import read_whole_plan
from saap.pipeline.prune.records import Measured, manifest_of_run
from saap.pipeline.prune.result import PruneReport, PruneResult, structure_of
from saap.pipeline.prune.speed_target import reached_speed
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.outcome import Behaviour, observe
from saap.pipeline.shared.targets import Target, finished_report, place_finished
from saap.structure_search.budget import TimeBudget

CHECKED_TOKENS = 64


def measure_result(run: Run, target: Target, made: Made) -> Behaviour | None:
    """What the result does, opened from its folder; of several processes the first alone opens what it has written."""
    if target.folder is not None:
        model, made.model = made.model, None
        if not run.processes.first:
            return None
        expected = None if model is None else _few_logits(run, model)
        if model is not None:
            release(model)
        if model is run.loaded.model and run.loaded.fresh is None:
            _forget_weights(model)  # the run holds it to its end
        del model
        forget_changed(run, target)
        made.model = open_result(run, made_folder(run, target))
        _check_same(expected, _logits_of_written(run, made.model, target), target)
    return observe(_model_of(made), run.loaded.tokenizer, run.tokens, run.spill)


def time_result(run: Run, target: Target, made: Made, pruned: Behaviour | None) -> SpeedRecord | None:
    """The speed of the result, where it was measured and one was requested."""
    if pruned is None or not isinstance(target.budget, TimeBudget):
        return None
    return reached_speed(run, target.budget, made.plan, _model_of(made))


def place_result(
    run: Run,
    target: Target,
    scores: ImportanceScores,
    dense: Behaviour,
    made: Made,
    pruned: Behaviour | None,
    speed: SpeedRecord | None,
) -> PruneResult:
    """The result with its records, in its place; the other processes open what the first has put there."""
    if pruned is None:
        run.processes.barrier()
        if finished_report(run.work, target) is None:
            raise VerificationError(
                f"{target.folder} has not been seen by process {run.processes.rank}",
                "Let all processes work on one file system",
            )
        return read_result(run, target)
    measured, model = Measured(dense, pruned, speed), _model_of(made)
    manifest = manifest_of_run(run, made.plan, scores, measured)
    report = _report(run, target, made, manifest, findings_of(run, made, scores, measured))
    if target.folder is not None:
        folder = made_folder(run, target)
        write_records(folder, manifest, made.base_model_type)
        place_finished(run.work, target, folder, report.as_dict())
        if offloaded(model) is not None:
            model = open_result(run, target.folder)  # its files have another place now
        run.processes.barrier()
    return PruneResult(model=model, plan=made.plan, report=report, path=target.folder)


def read_result(run: Run, target: Target) -> PruneResult:
    """The target's result, which has been put in its place."""
    folder = target.folder
    if folder is None:
        raise VerificationError("A result in memory cannot be read", "Run again")
    report = PruneReport.model_validate(finished_report(run.work, target))
    plan = read_whole_plan(run, folder / "saap" / "plan.json")
    return PruneResult(model=open_result(run, folder), plan=plan, report=report, path=folder)


def _model_of(made: Made) -> nn.Module:
    if made.model is None:
        raise VerificationError("The pruned model is neither in memory nor in the work folder", "Run again")
    return made.model


def _forget_weights(model: nn.Module) -> None:
    """Free the memory of a model that something else still holds; it keeps shapes, types and devices."""
    for parameter in model.parameters():
        parameter.data = placeholder(parameter.shape, parameter.dtype, parameter.device)


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


def _report(run: Run, target: Target, made: Made, manifest: RunManifest, findings: list[str]) -> PruneReport:
    """The same figures as the manifest's, with the structure and what looks wrong."""
    plan, folder, perplexity, answers = made.plan, target.folder, manifest.perplexity, manifest.answers
    if perplexity is None or answers is None:
        raise VerificationError("The result has not been measured", "Run again")
    lines = () if folder is None else load_lines(folder, str(plan.layout), auto_class(made.base_model_type).__name__)
    return PruneReport(
        model=manifest.base.source, path=None if folder is None else str(folder), target=target.name,
        layout=str(plan.layout), strategy=plan.strategy, seed=manifest.seed,
        pruning_ratio=manifest.block_parameters.removed,
        parameters_dense=manifest.parameters.before, parameters=manifest.parameters.after,
        block_parameters_dense=manifest.block_parameters.before, block_parameters=manifest.block_parameters.after,
        bytes_dense=manifest.bytes.before, bytes=manifest.bytes.after, dtype=manifest.dtype,
        evaluation_text=perplexity.text, evaluation_tokens=perplexity.tokens,
        perplexity_dense=perplexity.before, perplexity=perplexity.after,
        prompt=answers.prompt, answer_dense=answers.dense, answer=answers.pruned,
        speed=None if manifest.speed is None else manifest.speed.model_dump(),
        structure=structure_of(run.graph, plan), trail=plan.trail, refit_errors=dict(made.refit_errors),
        findings=tuple(findings), stages=manifest.stages, load_lines=lines,
    )  # fmt: skip
