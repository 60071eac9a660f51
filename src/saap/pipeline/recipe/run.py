"""Execution of recipes, and their dry run: finished steps are kept, changed ones are run again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from saap._version import __version__
from saap.core.errors import ModelError, OutputError, StaleInputError
from saap.core.records import ModelRef, digest_of
from saap.data.texts import DATA_SETS, check_source, is_file, read_documents
from saap.discovery import discover
from saap.discovery.blocks import find_blocks
from saap.export.placing import check_place
from saap.models.checkpoint.groupwise import linears_inside
from saap.models.loading.devices import pick_device, pick_dtype
from saap.models.loading.pretrained import load_tokenizer, model_without_weights
from saap.models.loading.references import ResolvedModel, resolve_model
from saap.pipeline.evaluate.run import check_request, evaluate_model, write_report
from saap.pipeline.export.run import check_packages, export_model
from saap.pipeline.prune.baselines import check_method, for_method, require_own_roles
from saap.pipeline.prune.planning import trial_plan
from saap.pipeline.prune.run import reachable_targets, run_prune
from saap.pipeline.prune.source_file import folder_experts, stored_bytes
from saap.pipeline.recover.context import check_early, read_data
from saap.pipeline.recover.run import run_recover
from saap.pipeline.shared.dense_model import manifest_of, resolve_dense
from saap.pipeline.shared.digests import model_digest, named_files, tree_digest
from saap.pipeline.shared.inputs import LoadedModel, RunOptions
from saap.pipeline.shared.legality import search_space
from saap.pipeline.shared.progress import Reporter, Silent
from saap.pipeline.shared.targets import plan_targets
from saap.pipeline.shared.work import WorkFolder
from saap.recovery.quantise import check_group_sizes
from saap.reporting.figures import require_matplotlib
from saap.reporting.report import build_page, write_page
from saap.settings.evaluate import EvalRequest
from saap.settings.export import ExportRequest
from saap.settings.prune import PrunableRole, PruneConfig
from saap.settings.recipe import Recipe
from saap.settings.recover import Tuning

STATE = "recipe.json"


def run_recipe(recipe: Recipe, reporter: Reporter | None = None) -> dict[str, Any]:
    """Run all steps that are not done yet. Returns them by name with their outputs, JSON-able.

    A step is done if its settings, their files, the model and its outputs are as recorded in `recipe.json` of the
    folder `out`. Raises SaapError, as far as possible before the first step.
    """
    reporter = reporter if reporter is not None else Silent()
    reporter.stage("read the inputs of the recipe")
    _check_inputs(recipe)
    steps = recipe_steps(recipe)
    state = _State(recipe.out)
    check_place(recipe.out / STATE, 0)
    kept = state.finished(steps)
    shown = []
    for step in steps:
        if step.name in kept:
            reporter.note(f"{step.name} is done already")
        else:
            state.record(step, done=False)
            step.run(reporter)
            state.record(step, done=True)
        outputs = [str(path) for path in step.outputs]
        shown.append({"name": step.name, "fate": "kept" if step.name in kept else "made", "outputs": outputs})
    return {"out": str(recipe.out), "steps": shown}


def _check_inputs(recipe: Recipe) -> None:
    """Check the later steps early, as far as that needs no results of earlier ones."""
    _check_requests(recipe)
    resolved = resolve_model(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    manifest = manifest_of(resolved) if recipe.prune is None else None  # a model pruned here has none yet
    tokenizer = load_tokenizer(resolved)
    _check_calibration(recipe, tokenizer)
    # a dense model that only a manifest specifies may be missing
    if recipe.recover is not None:
        check_early(recipe.recover, resolved, RunOptions(out=recipe.out))
        read_data(recipe.recover, tokenizer)
        if recipe.recover.teacher is not None:
            resolve_dense(recipe.recover, manifest)
    for request in recipe.eval.values():
        if request.dense is not None:
            resolve_dense(request, manifest)


def _check_calibration(recipe: Recipe, tokenizer: Any | None) -> None:
    """Read the files to calibrate on, so that a fault in a line is found before the model is loaded."""
    for source in () if recipe.prune is None else recipe.prune.calibration:
        if is_file(source):
            for _ in read_documents(source, tokenizer=tokenizer):
                pass


class _Record(BaseModel):
    """A started step; when it is done, with the digests of its outputs by their paths in the folder."""

    digest: str
    done: bool = False
    outputs: dict[str, str] = {}


class _Records(BaseModel):
    steps: dict[str, _Record]


class _State:
    """Records of steps in the folder of a recipe."""

    def __init__(self, out: Path) -> None:
        self._out, self._file = out, WorkFolder(out)
        try:
            self._known = _Records.model_validate(self._file.read_json(STATE) or {"steps": {}})
        except ValidationError:
            raise StaleInputError(f"{out / STATE} is not a record of a recipe", "Choose another `out`") from None

    def finished(self, steps: Sequence[Step]) -> set[str]:
        """Names of the finished steps. Raises OutputError for existing outputs that are not of this recipe."""
        kept: set[str] = set()
        for step in steps:
            entry = self._known.steps.get(step.name, _Record(digest="", done=True))
            there = [path for path in step.outputs if path.exists()]
            # leftovers of an interrupted step may be replaced
            others = (path for path in there if entry.outputs.get(self._name(path)) != tree_digest(path))
            if entry.done and (other := next(others, None)) is not None:
                raise OutputError(
                    f"{other} exists, and is not as this recipe has written it", "Move it away, or choose another `out`"
                )
            same = entry.done and entry.digest == step.digest and len(there) == len(step.outputs)
            if same and kept.issuperset(step.needs):
                kept.add(step.name)
        return kept

    def record(self, step: Step, *, done: bool) -> None:
        """Record that a step is done, or that its outputs may be incomplete or stale from now on."""
        outputs = {self._name(path): tree_digest(path) for path in step.outputs} if done else {}
        self._known.steps[step.name] = _Record(digest=step.digest, done=done, outputs=outputs)
        self._file.write_json(STATE, self._known.model_dump())

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._out))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step for one model. digest: of its settings and inputs. needs: names of earlier steps.

    outputs: files or folders that it writes. run: executes it, and may replace existing `outputs`.
    """

    name: str
    digest: str
    needs: tuple[str, ...]
    outputs: tuple[Path, ...]
    run: Callable[[Reporter], Any]


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model as input of later steps. folder: inside the folder of each step, '' if there is only one model.

    digest: '' if not needed. options: how it is opened, and where the next step writes.
    """

    source: str
    folder: str
    digest: str
    options: RunOptions
    needs: tuple[str, ...] = ()

    def step(
        self, name: str, settings: Mapping[str, Any], outputs: Iterable[Path], run: Callable[[Reporter], Any],
        *more: str,
    ) -> Step:  # fmt: skip
        """A step for this model. settings: as plain data. more: names of further required steps."""
        return Step(
            name=f"{name} ({self.folder})" if self.folder else name,
            digest=digest_of([self.digest, settings, named_files(settings)]) if self.digest else "",
            needs=(*self.needs, *more), outputs=tuple(outputs), run=run,
        )  # fmt: skip

    def made_by(self, step: Step, source: Path, folder: str, digest: str) -> _Subject:
        """The model written by a step, which has no revision."""
        options = self.options.model_copy(update={"revision": None})
        return _Subject(str(source), folder, digest, options, (step.name,))


def recipe_steps(recipe: Recipe, *, digests: bool = True) -> list[Step]:
    """All steps in order.

    digests: whether to compute them from the model's weights and the files in settings; else they are ''. Raises
    ModelError.
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
        into = options.model_copy(update={"out": recipe.out / "pruned"})
        targets = plan_targets(recipe.prune, into, check=False)
        folders = {target.name: target.path for target in targets if target.path is not None}
        run: Callable[[Reporter], Any] = partial(run_prune, recipe.model, recipe.prune, into)
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
            into = subject.options.model_copy(update={"out": out})
            run = partial(run_recover, subject.source, recipe.recover, into)
            steps.append(subject.step("recover", recipe.recover.model_dump(mode="json"), [out], run))
            subjects.append(subject.made_by(steps[-1], out, subject.folder, steps[-1].digest))
    return steps + [step for subject in subjects for step in _uses(recipe, subject)]


def _uses(recipe: Recipe, subject: _Subject) -> list[Step]:
    """The steps for a finished model: eval, export, report."""
    steps = []
    for name, request in recipe.eval.items():
        out = recipe.out / "eval" / subject.folder / f"{name}.json"
        run: Callable[[Reporter], Any] = partial(_evaluate, subject, request, out)
        steps.append(subject.step(f"eval.{name}", request.model_dump(mode="json"), [out], run))
    measured = list(steps)
    for name, wanted in recipe.export.items():
        out = recipe.out / "export" / subject.folder / f"{name}{wanted.format.suffix}"
        run = partial(_export, subject, wanted, out)
        steps.append(subject.step(f"export.{name}", wanted.model_dump(mode="json"), [out], run))
    if recipe.report is not None:
        folder = recipe.out / "report" / subject.folder
        figures = folder / "figures" if recipe.report.figures else None
        reports = [path for step in measured for path in step.outputs]
        outputs = [folder / "report.html", *([] if figures is None else [figures])]
        basis = {"evaluations": [step.digest for step in measured], "page_only": figures is None}
        run = partial(_report, Path(subject.source), reports, outputs[0], figures)
        steps.append(subject.step("report", basis, outputs, run, *(step.name for step in measured)))
    return steps


def _evaluate(subject: _Subject, request: EvalRequest, out: Path, reporter: Reporter) -> None:
    write_report(out, evaluate_model(subject.source, request, subject.options, reporter).as_dict())


def _export(subject: _Subject, request: ExportRequest, out: Path, reporter: Reporter) -> None:
    revision = subject.options.revision
    export_model(subject.source, out, request, overwrite=True, revision=revision, reporter=reporter)


def _report(source: Path, evaluations: Sequence[Path], out: Path, figures: Path | None, reporter: Reporter) -> None:
    write_page(build_page(source, evaluations), out, figures)


# A dry run finds the structure with tensors without values, so that any model fits a laptop.


def preview_recipe(recipe: Recipe) -> dict[str, Any]:
    """Preview of `run_recipe`, after all checks that need neither weights nor data sets of the hub.

    Returns JSON-able data: the model, and each step with its output and the size of a pruned model. Nothing is written.
    Raises SaapError.
    """
    pick_device(recipe.device)
    _check_requests(recipe, fetch=False)
    resolved = resolve_model(recipe.model, recipe.revision, recipe.trust_remote_code, weights=False)
    dtype = pick_dtype(recipe.dtype, source=resolved.dtype)
    tokenizer = load_tokenizer(resolved)
    _check_calibration(recipe, tokenizer)
    model = model_without_weights(resolved)
    if recipe.recover is not None:
        check_early(recipe.recover, resolved, RunOptions(out=recipe.out))
        if DATA_SETS.keys().isdisjoint(recipe.recover.data):
            read_data(recipe.recover, tokenizer)
    tuning = recipe.recover if recipe.prune is None else None
    if tuning is not None and tuning.tuning is Tuning.GROUPWISE:
        check_group_sizes(linears_inside(model, find_blocks(model)), tuning.group_size)
    steps = [] if recipe.prune is None else _pruned(recipe, recipe.prune, resolved, model, dtype)
    for step in recipe_steps(recipe, digests=False):
        if step.name != "prune":
            steps.append({"name": step.name, "output": str(step.outputs[0])})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"model": recipe.model, "class": type(model).__name__, "parameters": parameters, "steps": steps}


def _pruned(
    recipe: Recipe, config: PruneConfig, resolved: ResolvedModel, model: Any, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Discovery and the reachability of each target, on the model without weights.

    The size for a target speed is unknown until decoding is measured with weights, that with fewer tokens until the
    weights have chosen them, and that of a quantised folder until its files are on this machine.
    """
    require_own_roles(config)
    config = for_method(config)
    if config.target_speedup is not None:
        config.runtime.check()
    ref = ModelRef(source=recipe.model, revision=recipe.revision, config_digest="", weights_digest="")
    graph = discover(model, ref, finer_heads=PrunableRole.QUERY in config.roles)
    check_method(config, graph)
    options = RunOptions(out=recipe.out / "pruned", dtype=recipe.dtype)
    targets = plan_targets(config, options, check=False)
    rows: list[dict[str, Any]] = [
        {"name": "prune", "target": target.name, "output": str(target.path)} for target in targets
    ]
    space = search_space(model, graph, config)
    if config.prunes_vocabulary:
        return rows
    loaded = LoadedModel(
        model=model, tokenizer=None, ref=ref, dtype=dtype, owned=False, folder=resolved.folder,
        quantisation=resolved.quantisation,
    )  # fmt: skip
    try:
        experts = folder_experts(loaded, graph, config, options)
    except ModelError:  # has only the configuration, which tells no bytes
        return rows
    for row, target in zip(rows, reachable_targets(targets, config, loaded, graph, space, experts), strict=True):
        if config.target_speedup is not None:
            row |= {"speedup": config.target_speedup, "runtime": str(config.runtime)}
            continue
        plan = trial_plan(graph, target, space)
        written, size = str(dtype).removeprefix("torch."), plan.parameters * dtype.itemsize
        if experts is not None:
            written, size = experts.type, stored_bytes(experts, graph, plan).after
        row |= {"parameters": plan.parameters, "bytes": size, "dtype": written}
    return rows


def _check_requests(recipe: Recipe, *, fetch: bool = True) -> None:
    """Reject exports and reports without their packages, and unknown texts and tasks."""
    calibration = () if recipe.prune is None else recipe.prune.calibration
    training = () if recipe.recover is None else recipe.recover.data
    for source in (*calibration, *training):
        check_source(source)
    if recipe.report is not None:
        require_matplotlib()
    for wanted in recipe.export.values():
        check_packages(wanted)
    for request in recipe.eval.values():
        check_request(request, fetch=fetch)
