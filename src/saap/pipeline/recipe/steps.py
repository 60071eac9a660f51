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
from saap.pipeline.export.run import export_decilm, export_gguf
from saap.pipeline.prune.run import run_prune
from saap.pipeline.recover.run import run_recover
from saap.pipeline.shared.digests import model_digest, named_files
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.progress import Reporter
from saap.pipeline.shared.targets import plan_targets
from saap.reporting.report import build_page, write_page
from saap.settings.measure import EvalRequest, ExportFormat, ExportRequest
from saap.settings.recipe import Recipe


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
    steps: list[Step] = []
    resolved = resolve_model(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    common = [__version__, recipe.dtype, recipe.trust_remote_code]
    subjects = [_Subject(recipe.model, "", digest_of([*common, model_digest(resolved)]), ())]
    if recipe.prune is not None:
        subjects = _add_prune(steps, recipe, subjects[0])
    if recipe.recover is not None:
        subjects = [_add_recover(steps, recipe, subject) for subject in subjects]
    for subject in subjects:
        measured = [_eval_step(recipe, subject, name, request) for name, request in recipe.eval.items()]
        steps += measured
        steps += [_export_step(recipe, subject, name, request) for name, request in recipe.export.items()]
        if recipe.report is not None:
            steps.append(_report_step(recipe, subject, measured))
    return steps


def _add_prune(steps: list[Step], recipe: Recipe, subject: _Subject) -> list[_Subject]:
    config = recipe.prune
    if config is None:
        return [subject]
    options = _options(recipe, recipe.out / "pruned")
    targets = plan_targets(config, RunOptions(out=options.out, overwrite=True), check=False)
    digest = _digest(subject.digest, config)
    step = Step(
        name="prune", digest=digest, needs=(), outputs=tuple(t.folder for t in targets if t.folder is not None),
        run=lambda reporter: run_prune(recipe.model, config, options, reporter),
    )  # fmt: skip
    steps.append(step)
    return [
        _Subject(
            str(target.folder), target.name if len(targets) > 1 else "", digest_of([digest, target.name]), ("prune",)
        )
        for target in targets
    ]


def _add_recover(steps: list[Step], recipe: Recipe, subject: _Subject) -> _Subject:
    config = recipe.recover
    if config is None:
        return subject
    options = _options(recipe, recipe.out / "recovered" / subject.folder, of_hub=not subject.needs)
    name = _name("recover", subject)
    digest = _digest(subject.digest, config)
    steps.append(
        Step(
            name=name, digest=digest, needs=subject.needs, outputs=(recipe.out / "recovered" / subject.folder,),
            run=lambda reporter: run_recover(subject.source, config, options, reporter),
        )
    )  # fmt: skip
    return _Subject(str(options.out), subject.folder, digest, (name,))


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
    out = recipe.out / "export" / subject.folder / name
    if request.format is ExportFormat.DECILM:

        def to_folder(reporter: Reporter) -> None:
            export_decilm(subject.source, out, overwrite=True, revision=revision)

        outputs, carry_out = (out,), to_folder
    else:
        file = out.with_name(f"{name}.gguf")

        def to_file(reporter: Reporter) -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            export_gguf(
                subject.source, file, quantization=request.quantization, verify=request.verify, overwrite=True,
                revision=revision, reporter=reporter,
            )  # fmt: skip

        outputs, carry_out = (file,), to_file
    return Step(
        name=_name(f"export.{name}", subject), digest=_digest(subject.digest, request), needs=subject.needs,
        outputs=outputs, run=carry_out,
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
