"""Capability checks of a model and its family before anything is pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd, lcm

import torch
from torch import nn

from saap.core.errors import LayoutError, PlanError, SaapError, UnsupportedModelError, failure_of
from saap.core.records import CoupledGroup, Layout, ModelGraph, Role
from saap.discovery.groups import query_members
from saap.evaluation.perplexity import model_logits
from saap.models.checkpoint.stock_config import uniform_config
from saap.models.structure.keep_index import Kept
from saap.models.walk.probe import trial_ids
from saap.models.walk.walker import BlockWalker, inference_only
from saap.settings.prune import PrunableRole, PruneConfig, unit_roles
from saap.structure_search.plan import SearchSpace, make_plan

# Tolerance for half-precision rounding; state shared between blocks causes far larger errors.
WALK_TOLERANCE = 0.02


@torch.no_grad()
def check_walk(model: nn.Module, blocks: Sequence[str]) -> None:
    """Compare the logits of a block-wise walk with the model's own on two short sequences.

    Models with non-finite logits pass: their loss will report the sample. Raises UnsupportedModelError if the logits
    differ: blocks may pass on more than hidden states.
    """
    name, remedy = type(model).__name__, "Use a model whose blocks pass on only their hidden states"
    ids = trial_ids(model, 16).reshape(2, 8)
    try:
        with inference_only(model):
            expected = model_logits(model, ids)[1:, :5].float()
            walker = BlockWalker(model, blocks)
            stream = walker.start(ids)
            for _ in range(2):  # a stateful block returns something else the second time
                hidden = walker.run_blocks(stream)
            found = walker.logits(hidden[1:, :5]).float().to(expected.device)
            difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    except SaapError:
        raise
    except Exception as error:  # the model's own code may raise anything
        raise UnsupportedModelError(
            f"The blocks of {name} do not run one by one ({failure_of(error)})", remedy
        ) from error
    if expected.isfinite().all() and not difference <= WALK_TOLERANCE:  # rejects NaN too
        raise UnsupportedModelError(
            f"The logits of {name} differ between block by block and whole execution (by {difference:.1e})", remedy
        )


def search_space(model: nn.Module, graph: ModelGraph, config: PruneConfig) -> SearchSpace:
    """The structures that a run may choose.

    Raises LayoutError if a uniform layout allows none, or devices that will share the layers do not divide them.
    """
    legal = legal_sizes(model, graph, config)
    if config.tensor_parallel > 1:
        legal = divisible_sizes(graph, config, legal)
    return SearchSpace(
        roles=config.block_roles, layout=config.layout, align=config.alignment, skip_layers=config.skip_layers,
        legal_sizes=legal,
    )  # fmt: skip


def divisible_sizes(
    graph: ModelGraph, config: PruneConfig, legal: Mapping[Role, frozenset[int]] | None
) -> Mapping[Role, frozenset[int]]:
    """The legal sizes that `tensor_parallel` devices divide; channels are aligned to them anyway.

    A layer keeps at least one KV group for each device. Fewer KV groups than devices are copied, so they only have to
    divide the devices, and all stay; then the devices must divide the query heads. Raises LayoutError for a model whose
    own sizes are not divisible.
    """
    devices, found, steps = config.tensor_parallel, {}, _steps(graph, config.tensor_parallel)
    for group in graph.groups:
        count, units = _shared_units(group, devices)
        if count % devices:
            raise LayoutError(
                f"--tensor-parallel {devices} does not divide the {count} {units} of {group.name}",
                f"Use a divisor of {count}, or leave it out",
            )
    for role in unit_roles(config.block_roles):
        largest = max((group.units for group in graph.of_role(role)), default=0)
        sizes = range(devices if role is Role.ATTENTION else 0, largest + 1, steps.get(role, 1))
        found[role] = frozenset(sizes) if legal is None else legal[role].intersection(sizes)
    return found


def _shared_units(group: CoupledGroup, devices: int) -> tuple[int, str]:
    """How many parts of a group the devices share, 0 for other roles, and what these are."""
    if group.role is Role.FFN:
        return group.units, "channels"
    if group.role is not Role.ATTENTION:
        return 0, ""
    copied = devices % group.units == 0
    return (query_members(group.members)[1] * group.units, "query heads") if copied else (group.units, "KV groups")


def _steps(graph: ModelGraph, devices: int) -> dict[Role, int]:
    """Of what the kept units are a multiple, by role, so that the devices divide heads and channels."""
    kv_groups = [group.units for group in graph.of_role(Role.ATTENTION)]
    heads = lcm(*(devices // gcd(devices, count) for count in kv_groups))  # so many of each KV group
    return {Role.ATTENTION: devices, Role.FFN: devices, Role.QUERY: heads}


def require_divisible(graph: ModelGraph, keep: Mapping[str, Kept], devices: int) -> None:
    """Raise PlanError for sizes of a given plan that the devices do not divide. keep: by name of the group."""
    steps = _steps(graph, devices)
    for name, kept in keep.items():
        group, size = graph.group(name), kept if isinstance(kept, int) else len(kept)
        if size < group.units and size % steps.get(group.role, 1):
            raise PlanError(
                f"The plan keeps {size} units of {name}, which --tensor-parallel {devices} does not divide",
                "Change the plan, or leave --tensor-parallel out",
            )


def legal_sizes(model: nn.Module, graph: ModelGraph, config: PruneConfig) -> Mapping[Role, frozenset[int]] | None:
    """Allowed numbers of kept units in a uniform plan, by role; None for the adaptive layout, which allows all.

    Sizes are tested by constructing the configuration. For roles with single channels, the largest and smallest are
    tested first, and all others only if one of them is rejected (such as a width that the number of heads must divide).
    Raises LayoutError with the first reason if no requested role can be made smaller.
    """
    if config.layout is not Layout.UNIFORM:
        return None
    found: dict[Role, frozenset[int]] = {}
    reason: LayoutError | None = None
    for role in unit_roles(config.block_roles):
        groups, step = graph.of_role(role), config.alignment if role.of_channels else 1
        sizes = range(max(step, groups[0].least), groups[0].units, step) if groups else range(0)
        refusals = {size: _refusal(model, graph, role, size, config.alignment) for size in (*sizes[:1], *sizes[-1:])}
        if not role.of_channels or any(refusals.values()):
            refusals |= {size: _refusal(model, graph, role, size, config.alignment) for size in sizes[1:-1]}
        reason = reason or next((refusal for refusal in refusals.values() if refusal is not None), None)
        found[role] = frozenset(size for size in sizes if refusals.get(size) is None)
    if reason is not None and not any(found.values()) and PrunableRole.BLOCK not in config.roles:
        raise reason
    return found


def _refusal(model: nn.Module, graph: ModelGraph, role: Role, size: int, align: int) -> LayoutError | None:
    """Why the family cannot be built with `size` units of the role in every layer; None if it can."""
    keep = {group.name: tuple(range(size)) for group in graph.of_role(role)}
    plan = make_plan(graph, keep, (), layout=Layout.UNIFORM, strategy="trial", align=align)
    try:
        uniform_config(getattr(model, "config", None), graph, plan)
    except LayoutError as error:
        return error
    return None
