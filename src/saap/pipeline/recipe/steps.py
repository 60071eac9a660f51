"""The steps of a recipe: what each depends on, what it writes, and how it is carried out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
    """A model that later steps take. folder: inside the folder of each step, '' for the only one.

    digest: '' where none is wanted. options: how it is opened, and where the next step writes.
    """

    source: str
    folder: str
    digest: str
    options: RunOptions
    needs: tuple[str, ...] = ()

    def step(
        self, name: str, settings: Any, outputs: Iterable[Path], run: Callable[[Reporter], Any], *more: str
    ) -> Step:
        """A step for this model. settings: as plain data. more: names of further steps that it needs."""
        return Step(
            name=f"{name} ({self.folder})" if self.folder else name,
            digest=digest_of([self.digest, settings, named_files(settings)]) if self.digest else "",
            needs=(*self.needs, *more), outputs=tuple(outputs), run=run,
        )  # fmt: skip

    def made_by(self, step: Step, source: Path, folder: str, digest: str) -> _Subject:
        """The model that a step writes: opened without the revision and the trust of the first one."""
        options = dataclasses.replace(self.options, revision=None, trust_remote_code=False)
        return _Subject(str(source), folder, digest, options, (step.name,))


def recipe_steps(recipe: Recipe, *, digests: bool = True) -> list[Step]:
    """All steps in order.

    digests: read the model's weights and the files that settings name for them; else they are ''. Raises ModelError.
    """
    whole = ""
    if digests:
        resolved = resolve_model(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
        whole = digest_of([__version__, recipe.dtype, recipe.trust_remote_code, model_digest(resolved)])
    options = RunOptions(
        overwrite=True, device=recipe.device, dtype=recipe.dtype, revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    )  # fmt: skip
    model = _Subject(recipe.model, "", whole, options)
    steps, subjects = [], [model]
    if recipe.prune is not None:
        into = dataclasses.replace(options, out=recipe.out / "pruned")
        targets = plan_targets(recipe.prune, into, check=False)
        folders = {target.name: target.folder for target in targets if target.folder is not None}
        run = partial(run_prune, recipe.model, recipe.prune, into)
        step = model.step("prune", recipe.prune.model_dump(mode="json"), folders.values(), run)
        steps.append(step)
        subjects = [
            model.made_by(step, path, name if len(folders) > 1 else "", digest_of([step.digest, name]) if whole else "")
            for name, path in folders.items()
        ]
    if recipe.recover is not None:
        untuned, subjects = subjects, []
        for subject in untuned:
            out = recipe.out / "recovered" / subject.folder
            run = partial(run_recover, subject.source, recipe.recover, dataclasses.replace(subject.options, out=out))
            steps.append(subject.step("recover", recipe.recover.model_dump(mode="json"), [out], run))
            subjects.append(subject.made_by(steps[-1], out, subject.folder, steps[-1].digest))
    return steps + [step for subject in subjects for step in _uses(recipe, subject)]


def _uses(recipe: Recipe, subject: _Subject) -> list[Step]:
    """The steps that take a finished model: eval, export, report."""
    steps = []
    for name, request in recipe.eval.items():
        out = recipe.out / "eval" / subject.folder / f"{name}.json"
        run = partial(_evaluate, subject, request, out)
        steps.append(subject.step(f"eval.{name}", request.model_dump(mode="json"), [out], run))
    measured = list(steps)
    for name, wanted in recipe.export.items():
        as_folder = wanted.format is ExportFormat.DECILM
        out = recipe.out / "export" / subject.folder / (name if as_folder else f"{name}.gguf")
        run = partial(_export, subject, wanted, out)
        steps.append(subject.step(f"export.{name}", wanted.model_dump(mode="json"), [out], run))
    if recipe.report is not None:
        folder = recipe.out / "report" / subject.folder
        figures = folder / "figures" if recipe.report.figures else None
        reports = [path for step in measured for path in step.outputs]
        outputs = [folder / "report.html", *([] if figures is None else [figures])]
        basis = [[step.digest for step in measured], figures is None]
        run = partial(_report, Path(subject.source), reports, outputs[0], figures)
        steps.append(subject.step("report", basis, outputs, run, *(step.name for step in measured)))
    return steps


def _evaluate(subject: _Subject, request: EvalRequest, out: Path, reporter: Reporter) -> None:
    write_report(out, evaluate_model(subject.source, request, subject.options, reporter).as_dict())


def _export(subject: _Subject, request: ExportRequest, out: Path, reporter: Reporter) -> None:
    revision = subject.options.revision
    if request.format is ExportFormat.DECILM:
        export_decilm(subject.source, out, overwrite=True, revision=revision)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    export_gguf(
        subject.source, out, quantization=request.quantization, verify=request.verify, overwrite=True,
        revision=revision, reporter=reporter,
    )  # fmt: skip


def _report(source: Path, evaluations: Sequence[Path], out: Path, figures: Path | None, reporter: Reporter) -> None:
    write_page(build_page(source, evaluations), out, figures)
