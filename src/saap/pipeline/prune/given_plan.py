"""A plan that the user gives: everything that can be refused of it is refused before the estimation."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from saap.core.errors import ConfigurationError, LayoutError, PlanError, listed
from saap.core.records import Layout, ModelGraph
from saap.core.storage import PlanDocument, read_plan
from saap.models.checkpoint.stock_config import ADAPTIVE_REMEDY, uniform_config
from saap.pipeline.prune.baselines import for_method
from saap.pipeline.prune.planning import scored_roles
from saap.pipeline.prune.source_file import Experts, check_plan
from saap.pipeline.shared.legality import require_divisible
from saap.settings.prune import PruneConfig
from saap.structure_search.plan import complete_plan, flat_scores
from saap.surgery.cut import check_block_removal


def read_given_plan(
    path: Path, config: PruneConfig, model: nn.Module, graph: ModelGraph, experts: Experts | None
) -> PlanDocument:
    """The plan of a file, which the run can carry out. experts: of the files that the result is made from.

    Raises PlanError, LayoutError or ExportError.
    """
    given = read_plan(path, graph)
    if given.dropped_blocks:
        check_block_removal(model, graph.blocks)
    require_divisible(graph, given.keep(graph), config.tensor_parallel)
    if experts is not None:
        check_plan(experts, graph, given)
        given = given.model_copy(update={"layout": Layout.UNIFORM})
    elif "layout" in config.model_fields_set and config.layout is not given.layout:
        raise PlanError(
            f"--layout {config.layout} differs from the layout of {path}, {given.layout}",
            "Leave out --layout, or change `layout` in that file",
        )
    try:
        for_method(config.model_copy(update={"layout": given.layout}))
        _require_scored(path, given, config, graph)
        plan = complete_plan(graph, given, flat_scores(graph))
        if experts is None and plan.layout is Layout.UNIFORM:
            uniform_config(getattr(model, "config", None), graph, plan)
    except (ConfigurationError, LayoutError) as error:  # the flag does not change a plan
        remedy = error.remedy.replace(ADAPTIVE_REMEDY, f"Set `layout` in {path} to adaptive")
        raise type(error)(error.offender, remedy) from None
    return given


def _require_scored(path: Path, given: PlanDocument, config: PruneConfig, graph: ModelGraph) -> None:
    """Raise PlanError for a group with only a number of units if no score chooses among them."""
    numbers = {name for name, kept in given.keep(graph).items() if isinstance(kept, int)}
    unscored = [
        group for group in graph.groups
        if group.name in numbers and group.layer not in given.dropped_blocks and group.role not in scored_roles(config)
        and given.groups[group.name].kept != group.units
    ]  # fmt: skip
    if unscored:
        roles = " and ".join(dict.fromkeys(group.role for group in unscored))
        raise PlanError(
            f"{path} has only the number of units of {listed([group.name for group in unscored], 4)}, and units of "
            f"the role {roles} are not scored",
            f"Add {roles} to --roles, or list the `units`",
        )
