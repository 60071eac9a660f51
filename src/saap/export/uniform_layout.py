"""The uniform layout: a stock configuration with the plan's sizes, tested before anything is written.

Of n hidden channels, k are kept. The cut compensates for the removed ones in each norm, with epsilon n/k times as
large. If the stock class keeps its own epsilon, scaling the residual stream by sqrt(k/n) has the same effect: a norm
then divides by the same number as before, up to that factor. So all modules that write into the stream are scaled by
it. If a norm is between such a module and the stream, the norm's scale is multiplied instead. A class that scales its
embeddings by the square root of the width does that part itself.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from saap.core.errors import LayoutError, failure_of
from saap.core.records import ModelGraph, Role, StructurePlan
from saap.models.checkpoint.pruned_structure import EPSILON_NAMES, PrunedStructure, epsilon_name
from saap.models.checkpoint.stock_config import ADAPTIVE_REMEDY, stock_model, uniform_config
from saap.models.structure.norms import scaled_weight
from saap.models.walk.observer import hooked
from saap.models.walk.offload import offloaded, share_weights
from saap.models.walk.walker import without_cache

# Tolerance for rounding in buffers of another dtype; the error of a wrong scale is far larger.
TOLERANCE = 1e-2
Weights = Mapping[str, Tensor]


def stock_config(
    model: nn.Module, graph: ModelGraph, plan: StructurePlan, structure: PrunedStructure
) -> tuple[Any, Weights]:
    """A stock configuration with the plan's sizes whose class computes the same as the pruned model.

    The second result has weights that replace the model's own (see above), usually none. Raises LayoutError if the
    family's configuration cannot express the plan.
    """
    config = uniform_config(getattr(model, "config", None), graph, plan)
    special = sorted({*structure.constant, *structure.sliced_arguments, *structure.added_biases})
    if special:
        raise LayoutError(f"The stock class does not support the pruned {special[0]}", ADAPTIVE_REMEDY)
    plain = copy.deepcopy(config)
    try:
        stock = _without_weights(config)
        if _take_epsilon(config, stock, model):
            stock = _without_weights(config)
        _check_attributes(stock, structure)
        error = _difference(stock, model, {})
        if error <= TOLERANCE:
            return config, {}
        raise LayoutError(
            f"The stock class {type(stock).__name__} would not compute the same (logits differ by {error:.1e})",
            ADAPTIVE_REMEDY,
        )
    except LayoutError:
        norms = {path for group in graph.of_role(Role.HIDDEN) for path in group.scaled_norms}
        for weights in smaller_streams(model, graph, plan):
            stock = _without_weights(plain)
            _check_attributes(stock, structure, without_epsilon_of=norms)
            if _difference(stock, model, weights) <= TOLERANCE:
                return plain, weights
        raise


def _check_attributes(
    stock: nn.Module, structure: PrunedStructure, *, without_epsilon_of: Collection[str] = ()
) -> None:
    for path, attributes in structure.attributes.items():
        for name, value in attributes.items():
            if path in without_epsilon_of and name in EPSILON_NAMES:
                continue
            found = attrgetter(name)(stock.get_submodule(path))
            if abs(found - value) > 1e-6 * abs(value):
                raise LayoutError(f"The stock class would set {path}.{name} to {found}, not {value}", ADAPTIVE_REMEDY)


def _without_weights(config: Any) -> Any:
    """The stock model with buffers, and with empty parameters on the meta device."""
    with init_empty_weights(include_buffers=False):
        return stock_model(config).eval()


def _take_epsilon(config: Any, stock: nn.Module, model: nn.Module) -> bool:
    """Set the pruned model's norm epsilon in the configuration, if one field sets it for all norms."""
    wanted = {getattr(module, name) for module in model.modules() if (name := epsilon_name(module)) is not None}
    stated = {getattr(module, name) for module in stock.modules() if (name := epsilon_name(module)) is not None}
    if wanted == stated or len(wanted) != 1 or len(stated) != 1:
        return False
    epsilon = stated.pop()
    fields = [name for name, value in vars(config).items() if isinstance(value, float) and value == epsilon]
    if len(fields) == 1:
        setattr(config, fields[0], wanted.pop())
    return len(fields) == 1


@torch.no_grad()
def _difference(stock: Any, model: Any, changed: Weights) -> float:
    """Largest difference of the logits, relative to the largest logit, of `stock` with the model's weights.

    changed: weights that replace the model's own, by their first names; empty if those stay in files.
    """
    if offloaded(model) is not None:
        share_weights(model, stock)
    else:
        own = dict(model.state_dict(keep_vars=True))
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        state = {name: changed.get(first.get(id(value)) or name, value).detach() for name, value in own.items()}
        stock.load_state_dict(state, strict=True, assign=True)
    parameter = next(model.parameters())
    stock.to(parameter.device)
    ids = torch.arange(8, device=parameter.device).unsqueeze(0)
    expected = model(ids, **without_cache(model)).logits.float()
    try:
        found = stock(ids, **without_cache(stock)).logits.float()
    except Exception as error:  # the class may raise anything for unexpected sizes
        problem = f"The stock class {type(stock).__name__} does not run ({failure_of(error)})"
        raise LayoutError(problem, ADAPTIVE_REMEDY) from error
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


@torch.no_grad()
def smaller_streams(model: nn.Module, graph: ModelGraph, plan: StructurePlan) -> Iterator[Weights]:
    """Weights that replace the pruned model's own, by name, in two variants: embedding scaled or not.

    Yields nothing if the plan keeps all hidden channels. The caller measures which variant is right.
    """
    group = next((group for group in graph.of_role(Role.HIDDEN) if len(plan.kept(group)) < group.units), None)
    if group is None:
        return
    factor = (len(plan.kept(group)) / group.units) ** 0.5
    norms = list(graph.renamed(plan.dropped_blocks, dict.fromkeys(group.scaled_norms)))
    written = graph.renamed(plan.dropped_blocks, {member.tensor: member for member in group.producers})
    writers = [name for name in written if name.rpartition(".")[0] not in norms]
    smaller = {name: model.get_parameter(name) * factor for name in writers}
    inside = [name for name in writers if graph.block_of(name) >= 0]
    changed = {name: smaller.pop(name) for name in inside}
    changed |= _rescaled(model, _behind_writers(model, norms, inside), factor)
    last = [path for path in norms if graph.block_of(path) < 0]
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    tied = any(model.get_parameter(name) is head for name in smaller)
    yield {**changed, **smaller, **(_rescaled(model, last, 1 / factor) if tied else {})}
    yield changed


def _rescaled(model: nn.Module, norms: Sequence[str], factor: float) -> dict[str, Tensor]:
    weights = {f"{path}.weight": scaled_weight(model.get_submodule(path), factor) for path in norms}
    return {name: weight for name, weight in weights.items() if weight is not None}


def _behind_writers(model: nn.Module, norms: Sequence[str], writers: Sequence[str]) -> list[str]:
    """Norms whose input is the output of a module that writes into the stream, found by running a few tokens."""
    outputs: list[Tensor] = []
    behind: list[str] = []

    def wrote(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)

    def reads(path: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        read = arguments[0]
        if any(read.shape == output.shape and torch.equal(read, output) for output in outputs):
            behind.append(path)

    module = model.get_submodule
    paths = dict.fromkeys(name.rpartition(".")[0] for name in writers)
    with (
        hooked({module(path): wrote for path in paths}),
        hooked({module(path): partial(reads, path) for path in norms}, before=True),
    ):
        model(torch.arange(4, device=next(model.parameters()).device).unsqueeze(0), use_cache=False)
    return behind
