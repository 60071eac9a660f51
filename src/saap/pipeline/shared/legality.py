"""What a model and its family can do, checked before anything is pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from saap.core.errors import LayoutError, SaapError, UnsupportedModelError, first_line
from saap.core.records import Layout, ModelGraph, Role
from saap.evaluation.perplexity import model_logits
from saap.models.checkpoint.stock_config import uniform_config
from saap.models.walk.probe import trial_ids
from saap.models.walk.walker import BlockWalker, inference_only
from saap.settings.prune import PrunableRole, PruneConfig, unit_roles
from saap.structure_search.plan import SearchSpace, make_plan

# Rounding of a walk in half precision; a stream that blocks share in secret errs by far more.
WALK_TOLERANCE = 0.02


@torch.no_grad()
def check_walk(model: nn.Module, blocks: Sequence[str]) -> None:
    """Compare the logits of a walk from block to block with the model's own, for a part of two short sequences.

    A model that gives no numbers itself is left to its loss, which names the sample. Raises UnsupportedModelError where
    they differ: blocks may pass on more than hidden states.
    """
    name, remedy = type(model).__name__, "Use a model whose blocks pass on nothing but their hidden states"
    ids = trial_ids(model, 16).reshape(2, 8)
    try:
        with inference_only(model):
            expected = model_logits(model, ids)[1:, :5].float()
            walker = BlockWalker(model, blocks)
            stream = walker.start(ids)
            for _ in range(2):  # a block that remembers its last call gives something else the second time
                hidden = walker.run_blocks(stream)
            found = walker.logits(hidden[1:, :5]).float().to(expected.device)
            difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    except SaapError:
        raise
    except Exception as error:  # the model's own code, called with what it does not expect
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UnsupportedModelError(f"The blocks of {name} do not run one by one ({reason})", remedy) from error
    if expected.isfinite().all() and not difference <= WALK_TOLERANCE:  # NaN is refused too
        raise UnsupportedModelError(
            f"The blocks of {name} give other logits one by one than in the whole model ({difference:.1e} off)", remedy
        )


def search_space(model: nn.Module, graph: ModelGraph, config: PruneConfig) -> SearchSpace:
    """Which structures a run may choose. Raises LayoutError if a uniform layout allows none."""
    return SearchSpace(
        roles=config.roles, layout=config.layout, align=config.align, skip_layers=config.skip_layers,
        legal_sizes=legal_sizes(model, graph, config),
    )  # fmt: skip


def legal_sizes(model: nn.Module, graph: ModelGraph, config: PruneConfig) -> Mapping[Role, frozenset[int]] | None:
    """By role, the numbers of kept units that a uniform plan may have; None for the adaptive layout, which takes all.

    Sizes are tried by constructing the configuration: of roles that go by single channels the largest and the smallest
    first, and all between only where one of these is refused (the width that the number of heads must divide).
    Raises LayoutError, with the reason of the first refusal, if no requested role can be made smaller.
    """
    if config.layout is not Layout.UNIFORM:
        return None
    found: dict[Role, frozenset[int]] = {}
    reason: LayoutError | None = None
    for role in unit_roles(config.roles):
        groups, step = graph.of_role(role), config.align if role.of_channels else 1
        sizes = range(max(step, groups[0].least), groups[0].units, step) if groups else range(0)
        refusals = {size: _refusal(model, graph, role, size, config.align) for size in (*sizes[:1], *sizes[-1:])}
        if not role.of_channels or any(refusals.values()):
            refusals |= {size: _refusal(model, graph, role, size, config.align) for size in sizes[1:-1]}
        reason = reason or next((refusal for refusal in refusals.values() if refusal is not None), None)
        found[role] = frozenset(size for size in sizes if refusals.get(size) is None)
    if reason is not None and not any(found.values()) and PrunableRole.BLOCK not in config.roles:
        raise reason
    return found


def _refusal(model: nn.Module, graph: ModelGraph, role: Role, size: int, align: int) -> LayoutError | None:
    """Why the family cannot be built with `size` units of the role in every layer; None where it can."""
    keep = {group.name: tuple(range(size)) for group in graph.of_role(role)}
    plan = make_plan(graph, keep, (), layout=Layout.UNIFORM, strategy="trial", align=align)
    try:
        uniform_config(model.config, graph, plan)
    except LayoutError as error:
        return error
    return None
