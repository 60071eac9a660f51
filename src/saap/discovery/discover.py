"""From a model to its graph of coupled groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from saap.core.errors import UnsupportedModelError
from saap.core.records import CoupledGroup, ModelGraph, ModelRef, Refusal
from saap.discovery.attributes import checked
from saap.discovery.blocks import alike, find_blocks, require_own_weights
from saap.discovery.groups import TracedGroup, traced_groups
from saap.discovery.instance import Instance, SmallModelError, small_instance
from saap.discovery.reduce import ReducedModel, reduced
from saap.discovery.regrouping import one_of_each_block, query_heads
from saap.discovery.repeat import Naming, check_last_of_each_kind, everywhere, with_hidden_checked
from saap.discovery.trace import Trace, trace
from saap.models.checkpoint.stock_config import config_fields
from saap.models.loading.pretrained import model_ref, quiet_transformers


@quiet_transformers()
def discover(model: nn.Module, ref: ModelRef | None = None, *, finer_heads: bool = False) -> ModelGraph:
    """Find the coupled groups of a causal language model: FFN channels, KV groups, experts and hidden channels.

    model: forward(input_ids) gives the logits; it is only read. ref: which weights these are, made from the model if
    None. One block of each kind is traced and found again by name in all others; the last of each kind is traced too
    and must agree. finer_heads: also the query heads inside each KV group, which share their tensors with it.
    Parts that are not understood are in `refused`. Raises UnsupportedModelError if nothing can be
    pruned, or the forward cannot be traced.
    """
    ref = ref or model_ref(model, type(model).__name__)
    return of_structure(model, ref, finer_heads=finer_heads)


def of_structure(model: nn.Module, ref: ModelRef, *, finer_heads: bool) -> ModelGraph:
    """What `discover` finds; modules, shapes and configuration decide it, the weights do not."""
    blocks = find_blocks(model)
    require_own_weights(model, blocks)
    kinds = tuple(tuple(kind) for kind in alike(model, blocks))
    copy, traced = _trace(model, blocks, sorted({index for kind in kinds for index in (kind[0], kind[-1])}))
    naming = Naming(blocks, kinds, copy)
    groups_found = traced_groups(traced, copy.blocks)
    if finer_heads:
        groups_found += [finer for group in groups_found if (finer := query_heads(group)) is not None]
    found = with_hidden_checked(groups_found, naming)
    check_last_of_each_kind(found, naming)
    firsts: set[str | None] = {None, *(naming.traced_path(kind[0]) for kind in kinds)}
    needs = _needs(copy, found, firsts)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    results = everywhere(needs, naming, tuple(shapes))
    groups = tuple(item for item in results if isinstance(item, CoupledGroup))
    refused = tuple(item for item in results if isinstance(item, Refusal))
    if not groups:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in refused[:3]) or "no coupled channels were found"
        raise UnsupportedModelError(
            f"Nothing of {type(model).__name__} can be pruned ({reasons})",
            "Use a model whose blocks are made of operations that discovery knows",
        )
    graph = ModelGraph(model=ref, blocks=blocks, groups=groups, shapes=shapes, refused=refused)
    fields, pinned = config_fields(model, graph)
    return replace(graph, config_fields=fields, pinned_fields=pinned)


def _needs(copy: ReducedModel, groups: Sequence[TracedGroup], blocks: set[str | None]) -> list[TracedGroup]:
    """The groups of the given blocks and the hidden one with what removal needs; refused where it does not work."""
    numbers = [number for number, group in enumerate(groups) if group.block in blocks]
    try:
        instance = small_instance(copy, groups)
    except SmallModelError as error:
        return [groups[number].refuse(str(error)) for number in numbers]
    return [_checked_or_joined(copy, groups, instance, number) for number in numbers]


def _checked_or_joined(
    copy: ReducedModel, groups: Sequence[TracedGroup], instance: Instance, number: int
) -> TracedGroup:
    """What removal of single units needs, or of one unit from each block of a tensor where single ones cannot go."""
    found = checked(instance, number)
    joined = one_of_each_block(groups[number]) if found.refusal is not None else None
    if joined is None or groups[number].refusal is not None:
        return found
    changed = [joined if place == number else group for place, group in enumerate(groups)]
    try:
        again = checked(small_instance(copy, changed), number)
    except SmallModelError:
        return found
    return again if again.refusal is None else found


def _trace(model: nn.Module, blocks: Sequence[str], kept: Sequence[int]) -> tuple[ReducedModel, Trace]:
    """Trace the blocks `kept`; all of them where the forward needs every block."""
    try:
        copy = reduced(model, blocks, kept)
        traced = trace(copy.model)
    except UnsupportedModelError:
        if len(kept) == len(blocks):
            raise
        copy = reduced(model, blocks, range(len(blocks)))
        traced = trace(copy.model)
    idle = [
        blocks[index]
        for index, path in zip(copy.kept, copy.blocks, strict=True)
        if not any(module == path or module.startswith(path + ".") for module in traced.modules)
    ]
    if idle:
        raise UnsupportedModelError(
            f"The forward of {type(model).__name__} does not pass through {', '.join(idle)}",
            "Call the decoder blocks as modules, in one nn.ModuleList",
        )
    return copy, traced
