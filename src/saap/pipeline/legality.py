"""Which sizes the stock configuration of a family can express: asked before anything is pruned."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from saap.config import PrunableRole, PruneConfig, unit_roles
from saap.errors import LayoutError
from saap.models.uniform import uniform_config
from saap.records import Layout, ModelGraph, Role
from saap.structure_search.plan import make_plan


def legal_sizes(model: nn.Module, graph: ModelGraph, config: PruneConfig) -> Mapping[Role, frozenset[int]] | None:
    """By role, the numbers of kept units that a uniform plan may have; None for the adaptive layout, which takes all.

    Every size of attention is tried by constructing the configuration; of the wider roles, which the head count does
    not constrain, the largest and the smallest.
    Raises LayoutError, with the reason of the first refusal, if no asked role can be made smaller.
    """
    if config.layout is not Layout.UNIFORM:
        return None
    found: dict[Role, frozenset[int]] = {}
    reason: LayoutError | None = None
    for role in unit_roles(config.roles):
        groups = graph.of_role(role)
        step = config.align if role.of_channels else 1
        first = max(step, groups[0].least) if groups else step
        sizes = range(first, groups[0].units if groups else 0, step)
        tried = sorted({*sizes[:1], *sizes[-1:]}) if role.of_channels else sizes
        legal = set()
        for size in tried:
            keep = {group.name: tuple(range(size)) for group in groups}
            plan = make_plan(graph, keep, (), layout=Layout.UNIFORM, strategy="trial", align=config.align)
            try:
                uniform_config(model.config, graph, plan)
            except LayoutError as error:
                reason = reason or error
                continue
            legal.add(size)
        whole = role.of_channels and len(legal) == len(tried)
        found[role] = frozenset(sizes if whole else legal)
    if reason is not None and not any(found.values()) and PrunableRole.BLOCK not in config.roles:
        raise reason
    return found
