"""Opens a pruned model: the stock class of its family, built from the dense configuration and then resized.

config.json lists under `pruned_structure` what differs from the dense model. This file needs torch and transformers
only, and lies in the model's folder, so that the model opens wherever transformers does:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

vLLM's Transformers backend opens it in the same way, through AutoModel: `--model-impl transformers`.

The sizes are changed before the weights are read; a weight that is missing or has another size is an error.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)
from transformers.pytorch_utils import Conv1D

MODEL_TYPE = "saap_pruned"
FORMAT_VERSION = 6
# What readers of earlier formats understand: of the first all but added biases and resized buffers, of the second to
# fourth all but the latter, of the fifth all but added biases of modules without weights.
FIRST_FORMAT_VERSION, SECOND_FORMAT_VERSION, FIFTH_FORMAT_VERSION = 1, 2, 5

# Which integers of a module repeat the sizes of its weight, axis by axis.
SIZE_ATTRIBUTES: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Linear, ("out_features", "in_features")),
    (Conv1D, ("nx", "nf")),
    (nn.Embedding, ("num_embeddings", "embedding_dim")),
)


# Roles whose sizes vLLM reads from the configuration.
ROLES_OF_VLLM = ("attention", "query", "hidden")
UNLOADED_BY_VLLM = ("gpt2",)  # in its Transformers backend, and dense ones neither
# Warns of every global value that differs in single layers.
PER_LAYER_LOGGER = "transformers.integrations.heterogeneity.configuration_utils"

# Where a family's stock class is looked for: models that also read images have no class for text alone.
AUTO_CLASSES: tuple[tuple[Any, Any], ...] = (
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
)


class ConstantOutput(nn.Module):
    """Stands where a layer has lost all its inputs or all its outputs: gives its bias, or zeros."""

    bias: nn.Parameter | None

    def __init__(self, width: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.width = width
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """Nothing, for code that sets the weights of a layer at its start."""
        return torch.empty(0)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (..., anything). Returns (..., width)."""
        zeros = inputs.new_zeros(*inputs.shape[:-1], self.width)
        return zeros if self.bias is None else zeros + self.bias


class ArgumentSlice:
    """Forward pre-hook: cuts a tensor that a module is given with one entry per head (ALiBi) to the kept heads.

    axis: where the heads lie. per_sample: the axis holds the heads of each sample, sample by sample.
    """

    def __init__(
        self, module: nn.Module, *, argument: str, axis: int, per_sample: bool, units: int, kept: Sequence[int]
    ) -> None:
        self.argument, self.axis, self.per_sample = argument, axis, per_sample
        self.units, self.kept = units, list(kept)
        self.position = list(inspect.signature(module.forward).parameters).index(argument)

    def __call__(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Replace the argument wherever the caller put it."""
        if self.argument in keywords:
            keywords = {**keywords, self.argument: self.cut(keywords[self.argument])}
        elif self.position < len(arguments):
            values = list(arguments)
            values[self.position] = self.cut(values[self.position])
            arguments = tuple(values)
        return arguments, keywords

    def cut(self, tensor: Tensor | None) -> Tensor | None:
        """The kept heads of `tensor`."""
        if tensor is None:
            return None
        index = torch.tensor(self.kept, device=tensor.device)
        if not self.per_sample:
            return tensor.index_select(self.axis, index)
        shape = list(tensor.shape)
        shape[self.axis : self.axis + 1] = [-1, self.units]
        return tensor.reshape(shape).index_select(self.axis + 1, index).flatten(self.axis, self.axis + 1)

    def describe(self) -> dict[str, Any]:
        """What is needed to make the same hook again."""
        names = ("argument", "axis", "per_sample", "units", "kept")
        return {name: getattr(self, name) for name in names}


class ConfigView:
    """The model's configuration with some values of one module's own; all others follow the model's at any time."""

    def __init__(self, shared: Any) -> None:
        self._shared = shared

    def __getattr__(self, name: str) -> Any:
        if name == "_shared" or name.startswith("__"):  # copying asks for these before there is anything
            raise AttributeError(name)
        return getattr(self._shared, name)


def resize(model: nn.Module, parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter, wherever the model holds it, new data of another size."""
    parameter.data = data
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is parameter:
                _follow_size(module, name, parameter)


def _follow_size(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    if name == "weight":
        for kind, attributes in SIZE_ATTRIBUTES:
            if isinstance(module, kind):
                for attribute, size in zip(attributes, parameter.shape, strict=True):
                    setattr(module, attribute, size)
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = type(module.normalized_shape)(parameter.shape)


def set_attribute(module: Any, name: str, value: float) -> None:
    """Set an attribute of a module; `config.NAME` is set in the module's own view of the configuration."""
    if not name.startswith("config."):
        setattr(module, name, value)
        return
    view = module.config
    if not isinstance(view, ConfigView):
        view = module.config = ConfigView(view)
    setattr(view, name.removeprefix("config."), value)


def apply_structure(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Change a model built from the dense configuration to the sizes of the pruned one; its values mean nothing yet.

    structure: `constant` (module path -> width, bias), `shapes` (parameter -> sizes), `attributes` (module path ->
    name -> value), `sliced_arguments` (module path -> arguments of ArgumentSlice), and perhaps `added_biases` (names)
    and `buffers` (buffer -> sizes).
    """
    for name in structure.get("added_biases", ()):
        linear = cast(nn.Linear, model.get_submodule(name.removesuffix(".bias")))
        linear.register_parameter("bias", nn.Parameter(linear.weight.new_zeros(linear.out_features)))
    for path, constant in structure["constant"].items():
        parent, _, name = path.rpartition(".")
        bias = model.get_submodule(path)._parameters.get("bias") if constant["bias"] else None
        setattr(model.get_submodule(parent), name, ConstantOutput(constant["width"], bias))
    for name, shape in structure["shapes"].items():
        parameter = model.get_parameter(name)
        resize(model, parameter, parameter.data[tuple(slice(size) for size in shape)].clone())
    for name, shape in structure.get("buffers", {}).items():
        path, _, attribute = name.rpartition(".")
        buffers = model.get_submodule(path)._buffers
        buffers[attribute] = cast(Tensor, buffers[attribute])[tuple(slice(size) for size in shape)].clone()
    for path, attributes in structure["attributes"].items():
        for name, value in attributes.items():
            set_attribute(model.get_submodule(path), name, value)
    for path, arguments in structure["sliced_arguments"].items():
        module = model.get_submodule(path)
        module.register_forward_pre_hook(ArgumentSlice(module, **arguments), with_kwargs=True)


class SaapPrunedConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    """Entry for AutoConfig: gives the configuration of the family, marked as pruned."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The family's own configuration class does the reading."""
        found = config_dict["pruned_structure"]["format_version"]
        if found > FORMAT_VERSION:
            raise ValueError(f"The checkpoint has format {found}, this file reads up to {FORMAT_VERSION}.")
        return pruned_classes(config_dict["base_model_type"])[0].from_dict(config_dict, **kwargs)


class SaapPrunedForCausalLM(PreTrainedModel):  # type: ignore[misc, unused-ignore]
    """Entry for the auto classes: gives the stock class of the family, resized."""

    config_class = SaapPrunedConfig
    # vLLM asks the entry before it knows the family; the stock class then has the last word.
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, path: str, *arguments: Any, config: PretrainedConfig, **kwargs: Any) -> Any:
        """Open the folder with the class that belongs to `config`."""
        return cls.resized(config).from_pretrained(path, *arguments, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs: Any) -> Any:
        return cls.resized(config)._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Nothing to do: the classes made here carry their registration."""

    @classmethod
    def resized(cls, config: PretrainedConfig) -> Any:
        """The stock class of the family, resized."""
        return pruned_classes(cast(Any, config).base_model_type)[1]


class SaapPrunedModel(SaapPrunedForCausalLM):
    """Entry for AutoModel: the same without the head, the class that vLLM builds."""

    @classmethod
    def resized(cls, config: PretrainedConfig) -> Any:
        """The stock class of the family without its head, resized. Raises ValueError if there is none."""
        family = cast(Any, config).base_model_type
        config_class, _ = pruned_classes(family)
        if config_class not in MODEL_MAPPING:
            raise ValueError(f"transformers has no model without a head of type {family!r}.")
        return MODEL_MAPPING[config_class]


def auto_classes(model_type: str) -> list[tuple[Any, Any]]:
    """The auto classes that open stock models of this type, each with its mapping."""
    if model_type not in CONFIG_MAPPING:
        return []
    return [(auto, mapping) for auto, mapping in AUTO_CLASSES if CONFIG_MAPPING[model_type] in mapping]


@functools.cache
def pruned_classes(base_model_type: str) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Configuration and model class for pruned models of one family; registered with the auto classes that know it.

    The class without a head is registered with AutoModel. Raises ValueError if this version of transformers does not
    know the family.
    """
    known = auto_classes(base_model_type)
    if not known:
        raise ValueError(f"This version of transformers has no causal language model of type {base_model_type!r}.")
    stock_config: Any = CONFIG_MAPPING[base_model_type]

    class PrunedConfig(stock_config):  # type: ignore[misc]
        model_type = MODEL_TYPE
        _auto_class = "AutoConfig"

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """As in the stock class."""
            found = super().from_dict(config_dict, **kwargs)
            read_dense_sizes(found[0] if isinstance(found, tuple) else found)
            return found

    _take_names(PrunedConfig, SaapPrunedConfig)
    made = _resized(known[0][1][stock_config], PrunedConfig, known[0][0], SaapPrunedForCausalLM)
    for auto, _ in known:
        auto.register(PrunedConfig, made, exist_ok=True)
    if stock_config in MODEL_MAPPING:
        base = _resized(MODEL_MAPPING[stock_config], PrunedConfig, AutoModel, SaapPrunedModel)
        AutoModel.register(PrunedConfig, base, exist_ok=True)
    return PrunedConfig, made


def _resized(stock_model: Any, config: Any, auto: Any, entry: type) -> Any:
    """A subclass of a stock class whose modules get the sizes of `config.pruned_structure`."""

    class PrunedModel(stock_model):  # type: ignore[misc]
        config_class = config
        _auto_class = auto.__name__

        def __init__(self, config: PretrainedConfig, *arguments: Any, **kwargs: Any) -> None:
            structure, in_vllm = cast(Any, config).pruned_structure, _attention(config) == "vllm"
            reason = vllm_refusal(stock_model, config.to_dict()) if in_vllm else None
            if reason is not None:
                raise ValueError(f"vLLM cannot run this folder: {reason}. Or use transformers.")
            super().__init__(config, *arguments, **kwargs)
            apply_structure(self, _without_head(structure, self.base_model_prefix) if auto is AutoModel else structure)
            if in_vllm:
                _separate_constants(self)

        @classmethod
        def is_custom_code(cls) -> bool:
            """As the stock class, or transformers leaves buffers without values that it computes for its own."""
            return bool(stock_model.is_custom_code())

        @classmethod
        def _supports_default_dynamic_cache(cls) -> bool:
            """As the stock class; transformers looks at its name. Older versions ask an instance."""
            return bool(stock_model.__new__(stock_model)._supports_default_dynamic_cache())

        @classmethod
        def from_pretrained(cls, path: str, *arguments: Any, **kwargs: Any) -> Any:
            """As in the stock class, but weights that are missing or of another size are an error."""
            if kwargs.pop("ignore_mismatched_sizes", False):
                raise ValueError("ignore_mismatched_sizes would replace pruned weights by random ones.")
            with_info = kwargs.pop("output_loading_info", False)
            model, info = super().from_pretrained(path, *arguments, output_loading_info=True, **kwargs)
            if info["missing_keys"]:
                raise ValueError(f"Weights are missing in {path}: {', '.join(sorted(info['missing_keys']))}.")
            return (model, info) if with_info else model

    _take_names(PrunedModel, entry)
    return PrunedModel


def read_dense_sizes(config: Any) -> None:
    """Read the sizes that differ in single layers once, so that transformers does not warn of each later.

    A configuration has them twice: its own values, of the dense model, from which a model is built before it is
    resized, and those of single layers.
    """
    logger = logging.getLogger(PER_LAYER_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    for part in (config, config.get_text_config()):
        if getattr(part, "allow_global_per_layer_attribute_access", False):
            for name in getattr(part, "per_layer_attributes", None) or ():
                getattr(part, name)
    logger.setLevel(level)


def _attention(config: Any) -> str | None:
    return getattr(config.get_text_config(), "_attn_implementation", None)


def vllm_refusal(stock_model: Any, config: Mapping[str, Any]) -> str | None:
    """Why vLLM, which has its own attention and sizes its cache by the configuration, cannot run a pruned model."""
    family, structure = config["base_model_type"], config["pruned_structure"]
    unstated = [role for role in structure.get("unstated_roles", ()) if role in ROLES_OF_VLLM]
    experts = [name for name, shape in structure["shapes"].items() if len(shape) == 3 and ".experts." in name]
    if family in UNLOADED_BY_VLLM:
        return f"its Transformers backend does not load the weights of {family}"
    exchangeable = getattr(stock_model, "_can_set_attn_implementation", bool)  # older versions only have the flag
    if not (stock_model._supports_attention_backend or exchangeable()):
        return f"the class of {family} in transformers has only its own attention"
    if config.get("kv_lora_rank") is not None:
        return "it knows models with latent attention by their type, which a pruned one does not have"
    if unstated:
        return (
            f"the configuration of {family} has no field for fewer {unstated[0]} units in single layers; "
            "prune with `saap prune --roles ffn`"
        )
    if experts:
        return (
            f"it reads one size for the experts of all layers, and {experts[0]} has its own; "
            "prune with `saap prune --layout uniform`"
        )
    return None


def _separate_constants(model: nn.Module) -> None:
    """Give modules around constants a class of their own: vLLM fuses the layers of all modules of a class alike."""
    for module in model.modules():
        if any(isinstance(child, ConstantOutput) for child in module.children()):
            kind = type(module)
            module.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__})


def _take_names(made: type, public: type) -> None:
    """Name a class that is made here as the entry that stands for it."""
    made.__name__, made.__qualname__, made.__module__ = public.__name__, public.__qualname__, __name__


def _without_head(structure: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The part of a structure inside the model without its head, by the names that it has there."""
    start = f"{prefix}." if prefix else ""

    def inside(names: Iterable[str]) -> dict[str, str]:
        return {name: f"{name}.".removeprefix(start)[:-1] for name in names if f"{name}.".startswith(start)}

    mappings = ("constant", "shapes", "attributes", "sliced_arguments", "buffers")
    found: dict[str, Any] = {
        key: {new: structure[key][old] for old, new in inside(structure.get(key, {})).items()} for key in mappings
    }
    return {**found, "added_biases": list(inside(structure.get("added_biases", ())).values())}
