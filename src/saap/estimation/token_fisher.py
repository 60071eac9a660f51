"""Importance of units token by token: what the loss feels of each at every place of a text."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from saap.core.records import FloatArray, ModelGraph
from saap.models.structure.linear import weight_out_in
from saap.models.walk.processes import Processes
from saap.models.walk.spill import Spill
from saap.models.walk.token_fisher import channels_of_units, in_blocks, readers, walk_felt
from saap.models.walk.walker import BlockWalker, inference_only


@torch.no_grad()
def felt_scores(
    model: nn.Module,
    graph: ModelGraph,
    tokens: Tensor,
    *,
    micro_batch: int = 4,
    ignored: Collection[int] = (),
    spill: Spill | None = None,
    progress: Callable[[int, int], None] | None = None,
    processes: Processes | None = None,
    products: torch.dtype | None = None,
) -> dict[str, FloatArray]:
    """By group, for each unit the mean over tokens of (g_t W_u x_tu)^2: (units,).

    tokens: (sequences, length) ids. x_tu is what the module that reads the group's channels takes from unit u at token
    t, W_u its columns, g_t the gradient of the sequence's loss at its output: to first order, what the loss changes if
    the unit is silent at that token alone. The element-wise score squares the sum over a sample's tokens instead, in
    which they cancel each other. Only groups whose channels one module reads have these scores.
    ignored: ids of which no loss is taken. spill: see `walk_felt`. processes: that take a part of the sequences each;
    all get the whole result. products: the type in which blocks multiply matrices, None for that of the weights. The
    model is left as it was. Raises NonFiniteLossError.
    """
    processes = processes or Processes()
    by_path = readers(graph)
    walker = BlockWalker(model, graph.blocks, products=products)
    units = {path: channels_of_units(group) for path, group in by_path.items()}
    sums = {path: torch.zeros(len(rows), device=tokens.device) for path, rows in units.items()}

    def add(path: str, x: Tensor, gradient: Tensor) -> None:
        felt = (gradient @ weight_out_in(model.get_submodule(path)).float()) * x
        of_units = felt[:, units[path].to(felt.device)].sum(-1)
        sums[path] += of_units.square().sum(0).to(tokens.device)

    own = processes.share(len(tokens)) if spill is None else range(len(tokens))
    with inference_only(model):
        walk_felt(
            walker, tokens[own.start : own.stop], in_blocks(by_path, len(graph.blocks)), add,
            micro_batch=micro_batch, ignored=ignored, spill=spill, progress=progress,
        )  # fmt: skip
    if spill is None:
        sums = {path: processes.total(found) for path, found in sums.items()}
    return {by_path[path].name: (found / tokens.numel()).cpu().numpy() for path, found in sums.items()}
