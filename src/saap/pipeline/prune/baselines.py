"""Running a baseline in place of the method: its scores and rules become those of an ordinary run."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from saap.baselines.baseline import Baseline, Measurements, block_groups
from saap.core.errors import ConfigurationError
from saap.core.records import GroupScores, ImportanceScores, Layout, ModelGraph, Role, StructurePlan
from saap.models.walk.backend import Backend
from saap.pipeline.shared.context import Run
from saap.settings.prune import PrunableRole, PruneConfig, unit_roles
from saap.settings.registry import Method


def baseline_of(method: Method) -> Baseline | None:
    """The baseline of that name; None for SAAP itself."""
    baseline: Baseline | None = None if method is Method.SAAP else method.load()
    return baseline


def for_method(config: PruneConfig) -> PruneConfig:
    """The configuration with the rules of its method. Raises ConfigurationError for rules that contradict it."""
    baseline = baseline_of(config.method)
    if baseline is None:
        return config
    if config.layout is Layout.UNIFORM and baseline.compensation and not config.restore:
        raise ConfigurationError(
            f"--method {config.method} adds biases, which the stock class of --layout uniform has no place for",
            "Use --layout adaptive, or --restore in place of the biases",
        )
    rules: dict[str, Any] = {"strategy": baseline.strategy, "roles": baseline.roles or config.roles}
    if config.skip_layers is None and config.layout is not Layout.UNIFORM:
        rules["skip_layers"] = baseline.skip_layers
    return config.model_copy(update=rules)


def require_own_roles(config: PruneConfig) -> None:
    """Raise ConfigurationError for roles that were chosen, but are not the only ones of a baseline."""
    baseline = baseline_of(config.method)
    if baseline is None or baseline.roles is None or "roles" not in config.model_fields_set:
        return
    if set(config.roles) - {PrunableRole.VOCABULARY} != set(baseline.roles):
        raise ConfigurationError(
            f"--method {config.method} always removes {' and '.join(baseline.roles)}, not {' and '.join(config.roles)}",
            f"Leave out --roles, or use --roles {','.join(baseline.roles)}",
        )


def check_method(config: PruneConfig, graph: ModelGraph) -> None:
    """Raise ConfigurationError if the method cannot score a group of the requested roles."""
    baseline = baseline_of(config.method)
    if baseline is None:
        return
    roles = unit_roles(config.roles)
    wrong: tuple[str, str, str] | None = None
    unscored = next((role for role in roles if role not in baseline.scored), None)
    bundle = next((group.bundle for group in graph.groups if group.bundle and group.role in roles), None)
    inside = {group.layer for group in block_groups(graph)}
    bare = next((path for layer, path in enumerate(graph.blocks) if layer not in inside), None)
    if unscored is not None:
        wrong = f"does not score units of the role {unscored}", unscored, "this role"
    elif bundle is not None and Role.EXPERT not in baseline.scored:
        wrong = f"scores matrices one by one, and {bundle} of this model stacks its experts", Role.EXPERT, "ffn"
    elif bare is not None and PrunableRole.BLOCK in config.roles:
        wrong = f"scores a block by its units, and {bare} has none that can be removed", PrunableRole.BLOCK, "block"
    if wrong is not None:
        problem, needed, role = wrong
        every = ((method, baseline_of(method)) for method in Method)
        others = " or ".join(method for method, one in every if one is None or needed in one.scored)
        raise ConfigurationError(
            f"--method {config.method} {problem}", f"Use --method {others}, or leave {role} out of --roles"
        )


def measurements(run: Run) -> Measurements:
    """What the baselines measure, on the samples that the method's own scores are estimated on."""
    if run.measurements is not None:
        return run.measurements
    backend = Backend(run.loaded.model, run.graph, progress=run.meter.reporter.advance)
    return Measurements(backend, run.tokens.tensor("scored", run.device), seed=run.config.seed)


def with_measurements(run: Run) -> Run:
    """The run with the measurements that the biases of all its results need, so that they are made once.

    Others are needed for the scores alone, and may be large.
    """
    baseline = baseline_of(run.config.method)
    needed = baseline is not None and baseline.compensation is not None and not run.config.restore
    return dataclasses.replace(run, measurements=measurements(run)) if needed else run


def baseline_scores(run: Run) -> ImportanceScores:
    """The baseline's scores in the form of an estimation; they have no spread over samples."""
    groups = {}
    for name, scores in measurements(run).scores(run.config.method.load()).items():
        values = np.asarray(scores, dtype=np.float64)
        zero = np.zeros_like(values)
        groups[name] = GroupScores(vector=values, vector_m2=zero, element=values, element_m2=zero, comoment=zero)
    return ImportanceScores(
        graph_digest=run.graph.digest, calibration_digest=run.tokens.scored.digest,
        samples=len(run.tokens.scored.tokens), element_order=str(run.config.method),
        aggregation=str(run.config.aggregation), losses=np.zeros(0), groups=groups,
    )  # fmt: skip


def biases_for(run: Run, model: nn.Module, plan: StructurePlan) -> dict[str, torch.Tensor]:
    """The biases by which the method compensates for what `plan` removes from the dense `model`; most have none.

    A reconstruction compensates for the same and more, so there are none with it.
    """
    baseline = baseline_of(run.config.method)
    if baseline is None or not baseline.compensation or run.config.restore or plan.removes_nothing(run.graph):
        return {}
    return baseline.compensation(Backend(model, run.graph), measurements(run).of(baseline), plan.keep)
