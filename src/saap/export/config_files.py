"""config.json of both layouts."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from saap.core.errors import LayoutError, OutputError, first_line
from saap.core.records import ModelGraph, Role, StructurePlan
from saap.export.stream import Weights, smaller_streams
from saap.models.checkpoint.differences import (
    EPSILON_NAMES,
    PrunedStructure,
    epsilon_name,
    pruned_fields,
    read_attribute,
)
from saap.models.checkpoint.modeling_pruned import MODEL_TYPE, pruned_classes
from saap.models.checkpoint.stock_config import stock_model, uniform_config
from saap.models.walk.offload import offloaded, share_weights
from saap.models.walk.walker import without_cache

ADAPTIVE_REMEDY = "Use --layout adaptive"
# Room for other rounding in buffers made in another dtype; a wrong scale is far above it.
TOLERANCE = 1e-2


def adaptive_config(model: nn.Module, structure: PrunedStructure) -> Any:
    """The model's own configuration marked as pruned, with the sizes that it cannot say in `pruned_structure`.

    Raises OutputError if transformers' auto classes do not know the model, so that nothing could open the folder.
    """
    own: Any = getattr(model, "config", None)
    try:
        config_class, _ = pruned_classes(structure.base_model_type)
    except ValueError:
        raise OutputError(
            f"A model of class {type(model).__name__} cannot be opened from a folder",
            "Register its classes with AutoConfig and AutoModelForCausalLM, or prune without --out",
        ) from None
    return config_class.from_dict({**own.to_dict(), "model_type": MODEL_TYPE, **pruned_fields(structure)})


def stock_config(
    model: nn.Module, graph: ModelGraph, plan: StructurePlan, structure: PrunedStructure
) -> tuple[Any, Weights]:
    """A stock configuration with the plan's sizes, whose class computes what the pruned model does.

    The second result are weights to write in place of the model's own (see `saap.export.stream`), mostly none. All is
    tried on a few tokens before anything is written. Raises LayoutError if the family's configuration cannot say the
    plan.
    """
    config = uniform_config(getattr(model, "config", None), graph, plan)
    special = sorted({*structure.constant, *structure.sliced_arguments, *structure.added_biases})
    if special:
        raise LayoutError(f"The stock class cannot do what is left of {special[0]}", ADAPTIVE_REMEDY)
    plain = copy.deepcopy(config)
    try:
        _check_direct(config, model, structure)
    except LayoutError:
        norms = {path for group in graph.of_role(Role.HIDDEN) for path in group.scaled_norms}
        for weights in smaller_streams(model, graph, plan):
            stock = _without_weights(plain)
            _check_attributes(stock, structure, without_epsilon_of=norms)
            if _difference(stock, model, weights) <= TOLERANCE:
                return plain, weights
        raise
    return config, {}


def _check_direct(config: Any, model: nn.Module, structure: PrunedStructure) -> None:
    stock = _without_weights(config)
    if _take_epsilon(config, stock, model):
        stock = _without_weights(config)
    _check_attributes(stock, structure)
    error = _difference(stock, model, {})
    if not error <= TOLERANCE:
        raise LayoutError(
            f"The stock class {type(stock).__name__} would not compute the same (logits differ by {error:.1e})",
            ADAPTIVE_REMEDY,
        )


def _check_attributes(
    stock: nn.Module, structure: PrunedStructure, *, without_epsilon_of: Collection[str] = ()
) -> None:
    for path, attributes in structure.attributes.items():
        for name, value in attributes.items():
            if path in without_epsilon_of and name in EPSILON_NAMES:
                continue
            found = read_attribute(stock.get_submodule(path), name)
            if abs(found - value) > 1e-6 * abs(value):
                raise LayoutError(f"The stock class would set {path}.{name} to {found}, not {value}", ADAPTIVE_REMEDY)


def _without_weights(config: Any) -> Any:
    """The stock model with its buffers but with empty parameters on the meta device."""
    with init_empty_weights(include_buffers=False):
        return stock_model(config).eval()


def _take_epsilon(config: Any, stock: nn.Module, model: nn.Module) -> bool:
    """Give the configuration the pruned model's norm epsilon where one field says it for all norms."""
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
    """Largest difference of the logits, in units of the largest logit, when `stock` takes the model's weights.

    changed: weights in place of the model's own, by their first names; none where those stay in files.
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
    except Exception as error:  # its code, with sizes that it does not expect
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise LayoutError(f"The stock class {type(stock).__name__} does not run ({reason})", ADAPTIVE_REMEDY) from error
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def with_both_rope_spellings(fields: dict[str, Any]) -> dict[str, Any]:
    """config.json with the rotary embedding as `rope_parameters` and also as `rope_theta` and `rope_scaling`.

    Older readers know only the latter. fields: of a configuration in the new spelling, else returned as they are.
    """
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return fields
    if any(isinstance(value, dict) for value in rope.values()):
        bases = {kind: value.get("rope_theta") for kind, value in rope.items() if isinstance(value, dict)}
        old = {"rope_theta": bases.get("full_attention"), "rope_local_base_freq": bases.get("sliding_attention")}
        return {**{name: value for name, value in old.items() if value is not None}, **fields}
    old = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = {name: value for name, value in rope.items() if name not in old}
    return {**old, **fields}
