"""A dry run of a recipe: the structure from tensors without values, so that a laptop can look at any model."""

from __future__ import annotations

from typing import Any

import torch

from saap.core.records import ModelRef, count_parameters
from saap.core.storage import read_plan
from saap.data.texts import check_source
from saap.discovery import discover
from saap.discovery.blocks import find_blocks
from saap.evaluation.generation import BUNDLED
from saap.models.checkpoint.groupwise import linears_inside
from saap.models.loading.devices import pick_device, pick_dtype
from saap.models.loading.pretrained import load_tokenizer, model_without_weights
from saap.models.loading.references import resolve_model
from saap.models.structure.keep_index import KeepIndex
from saap.pipeline.evaluate.run import check_request
from saap.pipeline.prune.baselines import check_method, for_method
from saap.pipeline.recipe.run import recipe_steps
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.legality import search_space
from saap.pipeline.shared.targets import plan_targets, with_budgets
from saap.recovery.quantise import check_group_sizes
from saap.settings.prune import PruneConfig
from saap.settings.recipe import Recipe
from saap.structure_search.plan import check_reachable


def preview_recipe(recipe: Recipe) -> dict[str, Any]:
    """What `run_recipe` would do, after every check that needs neither weights nor data sets of the hub.

    Returns JSON-able data: the model, and each step with its output and, of a pruned model, its size. Nothing is
    written. Raises SaapError.
    """
    pick_device(recipe.device)
    _check_texts(recipe)
    resolved = resolve_model(recipe.model, recipe.revision, recipe.trust_remote_code, weights=False)
    dtype = pick_dtype(recipe.dtype, source=resolved.dtype)
    load_tokenizer(resolved)
    model = model_without_weights(resolved)
    if recipe.recover is not None and recipe.prune is None:
        check_group_sizes(linears_inside(model, find_blocks(model)), recipe.recover.group_size)
    steps = [] if recipe.prune is None else _pruned(recipe, for_method(recipe.prune), model, dtype)
    for step in recipe_steps(recipe, digests=False):
        if step.name != "prune":
            steps.append({"name": step.name, "output": str(step.outputs[0])})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"model": recipe.model, "class": type(model).__name__, "parameters": parameters, "steps": steps}


def _pruned(recipe: Recipe, config: PruneConfig, model: Any, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Discovery and the reachability of each target, on the model without weights.

    Of a target that is a speed, the size is not known before decoding was measured with weights.
    """
    if config.target_speedup is not None:
        config.runtime.check()
    ref = ModelRef(source=recipe.model, revision=recipe.revision, config_digest="", weights_digest="")
    graph = discover(model, ref)
    check_method(config, graph)
    targets = plan_targets(config, RunOptions(out=recipe.out / "pruned"), check=False)
    space = search_space(model, graph, config)
    rows: list[dict[str, Any]] = []
    for target in with_budgets(targets, config, graph, dtype):
        row = {"name": "prune", "target": target.name, "output": str(target.folder)}
        if config.target_speedup is not None:
            rows.append({**row, "speedup": config.target_speedup, "runtime": str(config.runtime)})
            continue
        if target.budget is not None:
            left = check_reachable(graph, target.budget, space).parameters
        elif config.plan is not None:
            given = read_plan(config.plan, graph)
            left = count_parameters(KeepIndex.of(graph, given.keep(graph), given.dropped_blocks).shapes)
        size = {"parameters": left, "bytes": left * dtype.itemsize, "dtype": str(dtype).removeprefix("torch.")}
        rows.append({**row, **size})
    return rows


def _check_texts(recipe: Recipe) -> None:
    """Refuse names of texts and tasks that nothing stands behind."""
    calibration = () if recipe.prune is None else recipe.prune.calibration
    training = () if recipe.recover is None else recipe.recover.data
    for source in (*calibration, *training):
        check_source(source)
    for request in recipe.eval.values():
        check_request(request)
        for source in request.texts:
            if source != BUNDLED:
                check_source(source)
