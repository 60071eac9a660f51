"""config.json of both layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from saap.errors import LayoutError, OutputError
from saap.models.modeling_pruned import MODEL_TYPE, pruned_classes
from saap.models.structure import PrunedStructure, pruned_fields, read_attribute
from saap.models.uniform import uniform_config
from saap.records import ModelGraph, StructurePlan

ADAPTIVE_REMEDY = "Use --layout adaptive"


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


def stock_config(model: nn.Module, graph: ModelGraph, plan: StructurePlan, structure: PrunedStructure) -> Any:
    """A stock configuration with the plan's sizes; its class has the pruned model's shapes and attributes.

    Raises LayoutError if the family's configuration cannot say them.
    """
    own: Any = getattr(model, "config", None)
    config = uniform_config(own, graph, plan)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(config)
    if structure.constant or structure.sliced_arguments:
        raise LayoutError("A module without any channels cannot be said in a stock configuration", ADAPTIVE_REMEDY)
    shapes = {name: tuple(parameter.shape) for name, parameter in stock.named_parameters()}
    for name, parameter in model.named_parameters():
        if shapes.get(name) != tuple(parameter.shape):
            raise LayoutError(f"The stock class would give {name} the sizes {shapes.get(name)}", ADAPTIVE_REMEDY)
    for path, attributes in structure.attributes.items():
        for name, value in attributes.items():
            found = read_attribute(stock.get_submodule(path), name)
            if abs(found - value) > 1e-6 * abs(value):
                raise LayoutError(f"The stock class would set {path}.{name} to {found}, not {value}", ADAPTIVE_REMEDY)
    return config


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
