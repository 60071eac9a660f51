"""Carrying out a recipe: what an earlier run has finished is kept, what has changed is made again."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from saap.core.errors import OutputError, StaleInputError
from saap.export.placing import check_place
from saap.models.loading.pretrained import load_tokenizer
from saap.models.loading.references import resolve_model
from saap.pipeline.evaluate.run import check_request
from saap.pipeline.recipe.steps import Step, recipe_steps
from saap.pipeline.recover.context import read_data
from saap.pipeline.shared.dense_model import DenseChoice, manifest_of, resolve_dense
from saap.pipeline.shared.digests import tree_digest
from saap.pipeline.shared.progress import Reporter, Silent
from saap.pipeline.shared.work import WorkFolder
from saap.settings.recipe import Recipe

STATE = "recipe.json"


class Fate(StrEnum):
    """What happens to a step."""

    KEPT = "kept"
    MADE = "made"


def run_recipe(recipe: Recipe, reporter: Reporter | None = None) -> dict[str, Any]:
    """Carry out all steps that are not done yet. Returns them by name with their outputs, JSON-able.

    A step is done when its settings, the files that they name, the model and its outputs are as they were recorded in
    `recipe.json` of the folder `out`. Raises SaapError; what can be refused early is refused before the first step.
    """
    reporter = reporter if reporter is not None else Silent()
    reporter.stage("read what the recipe names")
    _check_inputs(recipe)
    steps = recipe_steps(recipe)
    state = _State(recipe.out)
    check_place(recipe.out / STATE, 0)
    fates = state.fates(steps)
    shown = []
    for step in steps:
        if fates[step.name] is Fate.KEPT:
            reporter.note(f"{step.name} is done already")
        else:
            state.begin(step)
            step.run(reporter)
            state.finish(step)
        outputs = [str(path) for path in step.outputs]
        shown.append({"name": step.name, "fate": str(fates[step.name]), "outputs": outputs})
    return {"out": str(recipe.out), "steps": shown}


def _check_inputs(recipe: Recipe) -> None:
    """Refuse what a later step would refuse, as far as that needs no result of an earlier one."""
    resolved = resolve_model(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    manifest = manifest_of(resolved) if recipe.prune is None else None  # of what is pruned here there is none yet
    choices: list[DenseChoice | None] = []
    if recipe.recover is not None:
        read_data(recipe.recover, load_tokenizer(resolved))
        choices.append(DenseChoice.of(recipe.recover, recipe.recover.teacher))
    for request in recipe.eval.values():
        check_request(request)
        choices += DenseChoice.pair(request)
    for choice in choices:
        if choice is not None and choice.source is not None:  # one that only a manifest names may be missing
            resolve_dense(choice, manifest)


class _State:
    """The record of finished steps in the folder of a recipe."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._file = WorkFolder(out)
        known = self._file.read_json(STATE)
        steps = known.get("steps") if isinstance(known, dict) else {}
        if not isinstance(steps, dict) or not all(isinstance(entry, dict) for entry in steps.values()):
            raise StaleInputError(f"{out / STATE} is no record of a recipe", "Choose another `out`")
        self._steps: dict[str, dict[str, Any]] = dict(steps)

    def fates(self, steps: Sequence[Step]) -> dict[str, Fate]:
        """Which steps are done. Raises OutputError for outputs that are in the way and not of this recipe."""
        fates: dict[str, Fate] = {}
        for step in steps:
            entry = self._steps.get(step.name, {})
            there = [path for path in step.outputs if path.exists()]
            begun = bool(entry) and not entry.get("done")
            recorded = entry.get("outputs") or {}
            ours = begun or all(recorded.get(str(path.relative_to(self._out))) == tree_digest(path) for path in there)
            if not ours:
                raise OutputError(
                    f"{there[0]} is there, and not as this recipe wrote it", "Move it away, or choose another `out`"
                )
            done = entry.get("done") and entry.get("digest") == step.digest and len(there) == len(step.outputs)
            stays = done and all(fates[name] is Fate.KEPT for name in step.needs)
            fates[step.name] = Fate.KEPT if stays else Fate.MADE
        return fates

    def begin(self, step: Step) -> None:
        """Record that the outputs of a step may be incomplete, or of other settings, from now on."""
        self._steps[step.name] = {"digest": step.digest, "done": False}
        self._write()

    def finish(self, step: Step) -> None:
        """Record a finished step with the digests of what it wrote."""
        outputs = {str(path.relative_to(self._out)): tree_digest(path) for path in step.outputs}
        self._steps[step.name] = {"digest": step.digest, "done": True, "outputs": outputs}
        self._write()

    def _write(self) -> None:
        self._file.write_json(STATE, {"steps": self._steps})
