"""A narrower residual stream in the units of the stock class, which keeps its own epsilon.

Of n hidden channels k are left. The cut makes up for the missing ones in each norm, with epsilon n/k times as large.
The same is computed with the old epsilon where the whole stream is sqrt(k/n) as large: a norm then divides by what it
divided by before, up to that factor. So what writes into the stream is multiplied by it; of a norm between a writer and
the stream the scale is multiplied instead. A class that scales its embeddings by the root of the width does that part
itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.records import ModelGraph, Role, StructurePlan
from saap.models.structure.norms import scaled_weight

Weights = Mapping[str, Tensor]


@torch.no_grad()
def smaller_streams(model: nn.Module, graph: ModelGraph, plan: StructurePlan) -> Iterator[Weights]:
    """Weights in place of the pruned model's own, by name, for each way to scale the embedding: with it, or without.

    Nothing where the plan keeps all hidden channels. Which way is right is for the caller to measure.
    """
    group = next((group for group in graph.of_role(Role.HIDDEN) if len(plan.kept(group)) < group.units), None)
    if group is None:
        return
    factor = (len(plan.kept(group)) / group.units) ** 0.5
    norms = _names(group.scaled_norms, graph, plan)
    writers = _names(dict.fromkeys(member.tensor for member in group.producers), graph, plan)
    writers = [name for name in writers if name.rpartition(".")[0] not in norms]
    inside = [name for name in writers if any(name.startswith(f"{block}.") for block in graph.blocks)]
    outer = [name for name in writers if name not in inside]
    behind = _behind_writers(model, norms, inside)
    changed = {name: model.get_parameter(name) * factor for name in inside}
    changed |= _rescaled(model, behind, factor)
    last = [path for path in norms if not any(path.startswith(f"{block}.") for block in graph.blocks)]
    tied = _has_tied_head(model, outer)
    yield {
        **changed,
        **{name: model.get_parameter(name) * factor for name in outer},
        **(_rescaled(model, last, 1 / factor) if tied else {}),
    }
    yield changed


def _names(names: Iterable[str], graph: ModelGraph, plan: StructurePlan) -> list[str]:
    """The names as they are after the cut."""
    new = (graph.name_without(plan.dropped_blocks, name) for name in names)
    return [name for name in new if name is not None]


def _rescaled(model: nn.Module, norms: Sequence[str], factor: float) -> dict[str, Tensor]:
    found = {}
    for path in norms:
        weight = scaled_weight(model.get_submodule(path), factor)
        if weight is not None:
            found[f"{path}.weight"] = weight
    return found


def _has_tied_head(model: nn.Module, names: Sequence[str]) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return any(model.get_parameter(name) is getattr(head, "weight", None) for name in names)


def _behind_writers(model: nn.Module, norms: Sequence[str], writers: Sequence[str]) -> list[str]:
    """Norms whose input is what a writer puts out, as a few tokens show."""
    outputs: list[Tensor] = []
    behind: list[str] = []

    def wrote(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)

    def watch(path: str) -> Any:
        def reads(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            read = arguments[0]
            if any(read.shape == output.shape and torch.equal(read, output) for output in outputs):
                behind.append(path)

        return reads

    with ExitStack() as stack:
        for path in dict.fromkeys(name.rpartition(".")[0] for name in writers):
            stack.callback(model.get_submodule(path).register_forward_hook(wrote).remove)
        for path in norms:
            stack.callback(model.get_submodule(path).register_forward_pre_hook(watch(path)).remove)
        model(torch.arange(4, device=next(model.parameters()).device).unsqueeze(0), use_cache=False)
    return behind
