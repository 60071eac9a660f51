"""Record of an adaptive checkpoint: differences of a pruned model from its stock class and configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from saap.core.records import ModelGraph, StructurePlan, Value
from saap.models.checkpoint.layer_fields import LayerFields
from saap.models.checkpoint.modeling_pruned import (
    AUTO_CLASSES,
    FIFTH_FORMAT_VERSION,
    FIRST_FORMAT_VERSION,
    FORMAT_VERSION,
    SECOND_FORMAT_VERSION,
    ArgumentSlice,
    ConstantOutput,
    SaapPrunedConfig,
    SaapPrunedForCausalLM,
    SaapPrunedModel,
    auto_classes,
    pruned_classes,
    vllm_refusal,
)

MLX_LOADER = Path(__file__).with_name("mlx_pruned.py")
"""Code that opens a pruned model in MLX-LM; a copy lies in the model's folder."""
EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedStructure:
    """Sizes and attributes that the stock configuration cannot express.

    base_model_type: the stock model's type. shapes: of every resized parameter. attributes: module path -> name ->
    value (heads, norm epsilons). constant: modules without any inputs or outputs: path -> width of their output and
    whether a bias stays. sliced_arguments: module path -> the argument with one entry per head and the kept heads.
    added_biases: biases of linear modules that the stock class lacks. buffers: shapes of resized buffers. Dropped
    blocks are not recorded: the configuration has the number of blocks, and names are renumbered.
    layers: what the configuration states of single layers.
    """

    base_model_type: str
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    constant: Mapping[str, Mapping[str, int | bool]] = field(default_factory=dict)
    sliced_arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    added_biases: tuple[str, ...] = ()
    buffers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layers: LayerFields = field(default_factory=LayerFields)

    @property
    def is_empty(self) -> bool:
        """Whether the stock class can load the model."""
        return not (self.shapes or self.attributes or self.constant or self.sliced_arguments or self.added_biases)


def structure_of(model: nn.Module, graph: ModelGraph, plan: StructurePlan) -> PrunedStructure:
    """Describe a model that was cut by `plan`; everything is read from the model itself.

    graph: of the dense model, which may have been pruned before. model: with the plan's dropped blocks already removed.
    """
    config: Any = getattr(model, "config", None)
    earlier: Mapping[str, Any] = getattr(config, "pruned_structure", None) or {}

    def renamed(values: Mapping[str, Value]) -> dict[str, Value]:
        return graph.renamed(plan.dropped_blocks, values)

    dense, modules = renamed(graph.shapes), dict(model.named_modules())
    present = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shapes = {name: tuple(shape) for name, shape in renamed(earlier.get("shapes", {})).items() if name in present}
    constant = {path: module for path, module in modules.items() if isinstance(module, ConstantOutput)}
    stock = dense.keys() - renamed(dict.fromkeys(earlier.get("added_biases", ()))).keys()
    biases = [name for name in present if name.endswith(".bias")]
    buffers = {name: tuple(shape) for name, shape in renamed(earlier.get("buffers", {})).items()}
    # attributes that follow the kept units, epsilons of rescaled norms, and earlier changes
    attributes = {path: dict(values) for path, values in renamed(earlier.get("attributes", {})).items()}
    for group in graph.groups:
        kept = len(plan.kept(group))
        if group.layer in plan.dropped_blocks or kept == group.units:
            continue
        for attribute in group.attributes:
            for path in renamed({attribute.module: None}):
                attributes.setdefault(path, {})[attribute.attribute] = attribute.value(kept)
        for name in renamed({member.tensor: None for member in group.buffers}):
            buffers[name] = tuple(model.get_buffer(name).shape)
        for path in renamed(dict.fromkeys(group.scaled_norms)):
            norm = model.get_submodule(path)
            epsilon = epsilon_name(norm)
            if epsilon is not None and path not in constant:
                attributes.setdefault(path, {})[epsilon] = getattr(norm, epsilon)
    hooks = {path: argument_slice(module) for path, module in modules.items()}
    return PrunedStructure(
        base_model_type=str(getattr(config, "base_model_type" if earlier else "model_type", "")),
        shapes=shapes | {name: shape for name, shape in present.items() if shape != dense.get(name, shape)},
        attributes=attributes,
        constant={path: {"width": one.width, "bias": one.bias is not None} for path, one in constant.items()},
        sliced_arguments={path: hook.describe() for path, hook in hooks.items() if hook is not None},
        added_biases=tuple(name for name in biases if name not in stock),
        buffers=buffers,
        layers=LayerFields.of(config, graph, plan, earlier),
    )


def epsilon_name(norm: nn.Module) -> str | None:
    """Name of a norm's epsilon attribute; None if there is none."""
    return next((name for name in EPSILON_NAMES if hasattr(norm, name)), None)


def argument_slice(module: nn.Module) -> ArgumentSlice | None:
    """The hook that cuts an argument of the module to the kept heads, if it has one."""
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, ArgumentSlice)), None)


def removed_modules(model: nn.Module) -> list[str]:
    """Paths of the modules of a pruned model that have no weights left.

    They cannot have adapters: if you list peft's `target_modules`, add these to `exclude_modules`.
    """
    return [path for path, module in model.named_modules() if isinstance(module, ConstantOutput)]


def auto_class(base_model_type: str) -> Any:
    """The transformers auto class for models of this type, by default the one for text."""
    known = auto_classes(base_model_type)
    return known[0][0] if known else AutoModelForCausalLM


def refused_by_vllm(config: Mapping[str, Any]) -> str | None:
    """Why vLLM cannot run the folder with this config.json; None if it can, or the folder is a stock model's."""
    known = auto_classes(str(config.get("base_model_type")))
    if "pruned_structure" not in config or not known:
        return None
    stock_model = known[0][1][CONFIG_MAPPING[config["base_model_type"]]]
    return vllm_refusal(stock_model, config)


def mark_pruned(model: nn.Module, structure: PrunedStructure) -> None:
    """Prepare a cut transformers model, in place, so that `save_pretrained` writes a folder that can be reopened.

    The model gets the class of an adaptive checkpoint, and its configuration gets `pruned_structure`. A model of a
    class that the auto classes do not know is not changed.
    """
    if auto_classes(structure.base_model_type):
        config_class, model_class = pruned_classes(structure.base_model_type)
        if issubclass(model_class, type(model)):
            config: Any = model.config
            config.__class__, model.__class__ = config_class, model_class
            state_structure(config, structure)


def state_structure(config: Any, structure: PrunedStructure) -> None:
    """Set the fields by which the configuration of an adaptive checkpoint differs from the stock one, in place."""
    module = SaapPrunedConfig.__module__.rpartition(".")[2]
    known = auto_classes(structure.base_model_type) or AUTO_CLASSES[:1]
    sizes = asdict(structure)
    del sizes["base_model_type"], sizes["layers"]
    version = FIRST_FORMAT_VERSION  # the oldest format that supports it
    for name, needed in (("added_biases", SECOND_FORMAT_VERSION), ("buffers", FIFTH_FORMAT_VERSION)):
        if sizes[name]:
            version = needed
        else:
            del sizes[name]
    if any(name.removesuffix(".bias") in structure.constant for name in structure.added_biases):
        version = FORMAT_VERSION
    config.base_model_type = structure.base_model_type
    config.pruned_structure = {"format_version": version, **sizes, **structure.layers.record()}
    config.architectures = [SaapPrunedForCausalLM.__name__]
    config.auto_map = {
        "AutoConfig": f"{module}.{SaapPrunedConfig.__name__}",
        "AutoModel": f"{module}.{SaapPrunedModel.__name__}",
        **{auto.__name__: f"{module}.{SaapPrunedForCausalLM.__name__}" for auto, _ in known},
    }
    structure.layers.state_in(config)
