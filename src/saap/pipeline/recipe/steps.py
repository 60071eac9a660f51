"""The steps of a recipe: what each depends on, what it writes, and how it is carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from saap._version import __version__
from saap.core.records import digest_of
from saap.models.loading.references import resolve_model
from saap.pipeline.evaluate.run import evaluate_model, write_report
from saap.pipeline.export.run import export_model
from saap.pipeline.prune.run import run_prune
from saap.pipeline.recover.run import run_recover
from saap.pipeline.shared.digests import model_digest, named_files
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.progress import Reporter
from saap.pipeline.shared.targets import plan_targets
from saap.reporting.report import build_page, write_page
from saap.settings.measure import EvalRequest, ExportRequest
from saap.settings.prune import PruneConfig
from saap.settings.recipe import Recipe
from saap.settings.recover import RecoverConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step for one model. digest: of its settings and of all that it is made from. needs: names of earlier steps.

    outputs: files or folders that it writes. run: carries it out; what lies at `outputs` may be replaced then.
    """

    name: str
    digest: str
    needs: tuple[str, ...]
    outputs: tuple[Path, ...]
    run: Callable[[Reporter], Any]


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model that later steps take. folder: inside the folder of each step, '' for the only one."""

    source: str
    folder: str
    digest: str
    needs: tuple[str, ...]


def recipe_steps(recipe: Recipe) -> list[Step]:
    """All steps in order. Reads the model's weights and the named files for their digests. Raises ModelError."""
    resolved = resolve_model(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    common = [__version__, recipe.dtype, recipe.trust_remote_code]
    subjects = [_Subject(recipe.model, "", digest_of([*common, model_digest(resolved)]), ())]
    steps: list[Step] = []
    if recipe.prune is not None:
        step, subjects = _prune_step(recipe, recipe.prune, subjects[0])
        steps.append(step)
    if recipe.recover is not None:
        recoveries = [_recover_step(recipe, recipe.recover, subject) for subject in subjects]
        steps += [step for step, _ in recoveries]
        subjects = [subject for _, subject in recoveries]
    for subject in subjects:
        measured = [_eval_step(recipe, subject, name, request) for name, request in recipe.eval.items()]
        steps += measured
        steps += [_export_step(recipe, subject, name, request) for name, request in recipe.export.items()]
        if recipe.report is not None:
            steps.append(_report_step(recipe, subject, measured))
    return steps


def _prune_step(recipe: Recipe, config: PruneConfig, subject: _Subject) -> tuple[Step, list[_Subject]]:
    options = _options(recipe, recipe.out / "pruned")
    folders = {
        target.name: target.folder
        for target in plan_targets(config, RunOptions(out=options.out, overwrite=True), check=False)
        if target.folder is not None
    }
    step = Step(
        name="prune", digest=_digest(subject.digest, config), needs=(), outputs=tuple(folders.values()),
        run=lambda reporter: run_prune(recipe.model, config, options, reporter),
    )  # fmt: skip
    made = [
        _Subject(str(folder), name if len(folders) > 1 else "", digest_of([step.digest, name]), ("prune",))
        for name, folder in folders.items()
    ]
    return step, made


def _recover_step(recipe: Recipe, config: RecoverConfig, subject: _Subject) -> tuple[Step, _Subject]:
    out = recipe.out / "recovered" / subject.folder
    options = _options(recipe, out, of_hub=not subject.needs)
    step = Step(
        name=_name("recover", subject), digest=_digest(subject.digest, config), needs=subject.needs, outputs=(out,),
        run=lambda reporter: run_recover(subject.source, config, options, reporter),
    )  # fmt: skip
    return step, _Subject(str(out), subject.folder, step.digest, (step.name,))


def _eval_step(recipe: Recipe, subject: _Subject, name: str, request: EvalRequest) -> Step:
    out = recipe.out / "eval" / subject.folder / f"{name}.json"
    options = _options(recipe, None, of_hub=not subject.needs)

    def measure(reporter: Reporter) -> None:
        write_report(out, evaluate_model(subject.source, request, options, reporter).as_dict())

    return Step(
        name=_name(f"eval.{name}", subject), digest=_digest(subject.digest, request), needs=subject.needs,
        outputs=(out,), run=measure,
    )  # fmt: skip


def _export_step(recipe: Recipe, subject: _Subject, name: str, request: ExportRequest) -> Step:
    revision = None if subject.needs else recipe.revision
    out = recipe.out / "export" / subject.folder / f"{name}{request.format.suffix}"

    def export(reporter: Reporter) -> None:
        export_model(subject.source, out, request, overwrite=True, revision=revision, reporter=reporter)

    return Step(
        name=_name(f"export.{name}", subject), digest=_digest(subject.digest, request), needs=subject.needs,
        outputs=(out,), run=export,
    )  # fmt: skip


def _report_step(recipe: Recipe, subject: _Subject, measured: list[Step]) -> Step:
    folder = recipe.out / "report" / subject.folder
    figures = folder / "figures" if recipe.report is not None and recipe.report.figures else None
    reports = [path for step in measured for path in step.outputs]
    return Step(
        name=_name("report", subject),
        digest=digest_of([subject.digest, [step.digest for step in measured], figures is None]),
        needs=(*subject.needs, *(step.name for step in measured)),
        outputs=(folder / "report.html", *([] if figures is None else [figures])),
        run=lambda reporter: write_page(build_page(Path(subject.source), reports), folder / "report.html", figures),
    )  # fmt: skip


def _name(step: str, subject: _Subject) -> str:
    return f"{step} ({subject.folder})" if subject.folder else step


def _options(recipe: Recipe, out: Path | None, *, of_hub: bool = True) -> RunOptions:
    return RunOptions(
        out=out, overwrite=True, device=recipe.device, dtype=recipe.dtype,
        revision=recipe.revision if of_hub else None, trust_remote_code=recipe.trust_remote_code and of_hub,
    )  # fmt: skip


def _digest(before: str, settings: BaseModel) -> str:
    values = settings.model_dump(mode="json")
    return digest_of([before, values, named_files(values)])
