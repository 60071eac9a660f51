"""Opens a pruned model in MLX-LM: the stock class of its family, with the sizes of the stored weights.

config.json lists under `pruned_structure` what differs from the dense model. This file needs mlx-lm 0.31 or newer and
lies in the model's folder, so that MLX-LM opens it, also after `mlx_lm.convert`:

    mlx_lm.generate --model FOLDER --trust-remote-code
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.models.switch_layers import SwitchGLU
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# How the stock classes name the numbers of heads, and the projections that tell them.
QUERY_HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_head")
KEY_HEADS = ("n_kv_heads", "num_key_value_heads")
KEY_PROJECTIONS = ("k_proj", "key_proj")
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense")
# Fields of older configurations, and where newer ones have the value.
OLDER_FIELDS = {
    "n_ctx": "n_positions", "num_experts": "num_local_experts",
    "rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor",
}  # fmt: skip
# The output head of a family that was renamed in transformers.
HEAD, OLDER_HEAD = "lm_head.weight", "embed_out.weight"
ATTENTION_KINDS = ("full_attention", "sliding_attention")
SLIDING = ("is_sliding", "use_sliding")
EPSILONS = ("variance_epsilon", "eps", "epsilon")

Weights = dict[str, Any]


class PrunedConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    """A configuration for the tokenizer: without it transformers would run the folder's own, which needs torch."""

    model_type = "saap_pruned"


if PrunedConfig.model_type not in CONFIG_MAPPING:
    AutoConfig.register(PrunedConfig.model_type, PrunedConfig)


class ModelArgs:
    """The stock class of the family with its arguments, and the configuration."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.structure: Mapping[str, Any] = config.get("pruned_structure", {})
        stock = with_stock_fields({**config, "model_type": config.get("base_model_type", config["model_type"])})
        self.model_class, arguments = stock_classes(stock)
        self.arguments = arguments.from_dict(stock)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelArgs:
        """Called by MLX-LM with the contents of config.json."""
        return cls(config)


def with_stock_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the fields that MLX-LM's classes read and transformers no longer writes."""
    found = {older: config[name] for older, name in OLDER_FIELDS.items() if name in config}
    kinds = config.get("layer_types") or ()
    widths = {own["head_dim"] for own in (config.get("per_layer_config") or {}).values() if "head_dim" in own}
    if len(widths) == 1:
        found["global_head_dim"] = widths.pop()
    if "full_attention" in kinds:
        found["sliding_window_pattern"] = kinds.index("full_attention") + 1
    return {**found, **config}


def stock_classes(config: dict[str, Any]) -> Any:
    """MLX-LM's classes of the model and of its arguments for a stock configuration.

    Raises ValueError if this version of MLX-LM does not know the family.
    """
    try:
        return utils._get_classes(config)
    except (ValueError, SystemExit):  # a module without its package ends the process
        problem = f"mlx-lm {version('mlx-lm')} has no model of type {config['model_type']!r}"
        raise ValueError(f"{problem}; update mlx-lm, or use the folder with transformers.") from None


def Model(args: ModelArgs) -> Any:  # noqa: N802 - the name that MLX-LM asks for
    """The stock model, which takes the pruned sizes when MLX-LM gives it the weights."""

    class PrunedModel(args.model_class):  # type: ignore[misc, name-defined, unused-ignore]
        def sanitize(self, weights: Weights) -> Weights:
            """Names and shapes as the stock class has them; the model is changed to these shapes."""
            weights = under_stock_names(self, weights, getattr(super(), "sanitize", dict))
            weights = without_removed(self, args.structure, weights)
            dense = resize(self, weights, args.config.get("quantization") or {})
            set_heads(self, dense)
            set_epsilons(self, args.structure)
            return weights

    if args.structure.get("sliced_arguments"):
        paths = ", ".join(args.structure["sliced_arguments"])
        raise ValueError(f"MLX-LM cannot cut the per-head arguments of {paths}; prune the FFNs only.")
    model = PrunedModel(args.arguments)
    check_layers(model, args.config)
    return model


class Removed(nn.Module):  # type: ignore[misc, unused-ignore]
    """Stands for an attention or FFN without weights: gives its output bias, or zeros."""

    def __init__(self, bias: Any = None) -> None:
        super().__init__()
        if bias is not None:
            self.bias = bias

    def __call__(self, inputs: Any, *arguments: Any, cache: Any = None, **keywords: Any) -> Any:
        """inputs: (batch, tokens, width). Returns the same shape."""
        cache = next((one for one in (cache, *arguments) if hasattr(one, "update_and_fetch")), None)
        if cache is not None:  # the masks of all layers follow the offset of one cache
            nothing = mx.zeros((inputs.shape[0], 1, inputs.shape[1], 1), dtype=inputs.dtype)
            cache.update_and_fetch(nothing, nothing)
        zeros = mx.zeros_like(inputs)
        return zeros + self.bias if "bias" in self else zeros


def check_layers(model: Any, config: Mapping[str, Any]) -> None:
    """Raise ValueError if layers attend otherwise in the stock class than in the model."""
    kinds = config.get("layer_types") or ()
    wrong = {f"layer {layer} ({kind})" for layer, kind in enumerate(kinds) if kind not in ATTENTION_KINDS}
    slides = False
    for path, module in model.named_modules():
        layer = re.search(r"\.(\d+)(?:\.|$)", path)
        sliding = next((getattr(module, name) for name in SLIDING if name in vars(module)), None)
        if layer is None or sliding is None or int(layer[1]) >= len(kinds):
            continue
        slides = True
        if sliding != (kinds[int(layer[1])] == "sliding_attention"):
            wrong.add(f"layer {layer[1]} ({kinds[int(layer[1])]})")
    if slides and kinds and "full_attention" not in kinds:
        wrong.add("every layer (sliding_attention)")
    if wrong:
        problem = f"{stock_name(model)} has another attention in {', '.join(sorted(wrong))}"
        raise ValueError(f"{problem}; prune without removing whole blocks.")


def stock_name(model: Any) -> str:
    """MLX-LM's module with the stock class."""
    return next(one.__module__ for one in type(model).__mro__ if one.__module__.startswith("mlx_lm."))


def tail(path: str) -> str:
    """A path from its layer number on, which the classes of transformers and MLX-LM mostly share."""
    found = re.search(r"(?:^|\.)(\d+\..*)", path)
    return found[1] if found else path


def find(model: nn.Module, path: str) -> tuple[str, Any]:
    """Path and module of MLX-LM for a module path of transformers. Raises ValueError if there is none."""
    modules = {name: module for name, module in model.named_modules() if name}
    names = [name for name in modules if name == path] or [name for name in modules if tail(name) == tail(path)]
    if len(names) != 1:
        raise ValueError(f"{stock_name(model)} has no module {path}, which was changed.")
    return names[0], modules[names[0]]


def under_stock_names(model: Any, weights: Weights, sanitize: Callable[[Weights], Weights]) -> Weights:
    """The weights under the names of MLX-LM's class. sanitize: of the stock class.

    It expects one matrix per expert, and where the checkpoints of a family have no prefix, none.
    """
    names = {name for name, _ in tree_flatten(model.parameters())}
    weights = with_stacked_experts(model, weights)
    if OLDER_HEAD in {".".join(name.split(".")[-2:]) for name in names} and HEAD in weights:
        weights[OLDER_HEAD] = weights.pop(HEAD)
    found = sanitize(dict(weights))
    if names.isdisjoint(found):
        prefix = next(iter(weights), "").partition(".")[0] + "."
        found = sanitize({name.removeprefix(prefix): weight for name, weight in weights.items()})
    return found


def with_stacked_experts(model: nn.Module, weights: Weights) -> Weights:
    """Weights whose experts, stacked as transformers has them, are in MLX-LM's own layout."""
    switches = [path for path, module in model.named_modules() if isinstance(module, SwitchGLU)]
    places: dict[str, str] = {}  # path of a mixture of experts in transformers -> path of its experts in MLX-LM
    for name in weights:
        stacked = re.fullmatch(r"((.+\.\d+)\..+)\.experts\.down_proj", name)
        path = next((one for one in switches if stacked and one.startswith(f"{stacked[2]}.")), None)
        if stacked and path is not None:
            places[stacked[1]] = path
    found: Weights = {}
    for name, weight in weights.items():
        place = next((one for one in places if name.startswith(f"{one}.")), None)
        if place is None:
            found[name] = weight
            continue
        experts, part = places[place], name.removeprefix(f"{place}.")
        if part == "experts.gate_up_proj":
            found[f"{experts}.gate_proj.weight"], found[f"{experts}.up_proj.weight"] = mx.split(weight, 2, axis=1)
        elif part == "experts.down_proj":
            found[f"{experts}.down_proj.weight"] = weight
        else:
            found[f"{experts.rpartition('.')[0]}.{part}"] = weight
    return found


def without_removed(model: Any, structure: Mapping[str, Any], weights: Weights) -> Weights:
    """Replace modules without weights by constants, and drop what is stored of their other parts.

    Raises ValueError if the parts of a whole block are removed, or if a bias is missing.
    """
    removed: dict[str, str | None] = {}  # module -> its output projection, if that keeps a bias
    for path, constant in structure.get("constant", {}).items():
        parent, _, leaf = path.rpartition(".")
        removed[parent] = leaf if constant["bias"] else removed.get(parent)
    for path, part in removed.items():
        name, _ = find(model, path)
        if name.rpartition(".")[2].isdigit():
            raise ValueError(f"MLX-LM cannot remove parts of the whole block {path}.")
        inside = {one: weights.pop(one) for one in list(weights) if one.startswith(f"{name}.")}
        bias = inside.get(f"{name}.{part}.bias", inside.get(f"{name}.bias")) if part else None
        if part and bias is None:
            raise ValueError(f"The bias {path}.{part}.bias is missing.")
        parent, _, leaf = name.rpartition(".")
        setattr(find(model, parent)[1], leaf, Removed(bias))
        if bias is not None:
            weights[f"{name}.bias"] = bias
    return weights


def full_shape(name: str, weights: Weights, quantization: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of a weight before it was quantised."""
    path = name.removesuffix(".weight")
    scales, shape = weights.get(f"{path}.scales"), tuple(weights[name].shape)
    if scales is None or name == path:
        return shape
    own = quantization.get(path)
    size = (own if isinstance(own, Mapping) else quantization)["group_size"]
    return (*shape[:-1], scales.shape[-1] * size)


def resize(model: nn.Module, weights: Weights, quantization: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Give the parameters the shapes of the weights, and linear modules the biases that the stock class lacks.

    Returns the stock shapes of the resized parameters. Raises ValueError if one would have to grow.
    """
    modules, parameters = dict(model.named_modules()), dict(tree_flatten(model.parameters()))
    dense: dict[str, tuple[int, ...]] = {}
    for name in weights:
        path, _, leaf = name.rpartition(".")
        shape = full_shape(name, weights, quantization)
        if name not in parameters:
            if leaf == "bias" and isinstance(modules.get(path), nn.Linear):
                modules[path].bias = mx.zeros(shape)
            continue  # MLX-LM itself names weights that it has no place for
        stock = tuple(parameters[name].shape)
        if shape == stock:
            continue
        if len(shape) != len(stock) or any(new > old for new, old in zip(shape, stock, strict=True)):
            raise ValueError(f"MLX-LM's class has {name} of shape {stock}, which cannot become {shape}.")
        dense[name] = stock
        setattr(modules[path], leaf, mx.zeros(shape, dtype=parameters[name].dtype))
    return dense


def set_heads(model: nn.Module, dense: Mapping[str, tuple[int, ...]]) -> None:
    """Set the numbers of heads of attention modules whose projections were resized. dense: stock shapes."""
    for path, module in model.named_modules():
        queries = [name for name in QUERY_HEADS if isinstance(vars(module).get(name), int)]
        linears = {name: child for name, child in module.children().items() if isinstance(child, nn.Linear)}
        output = next((name for name in OUTPUT_PROJECTIONS if name in linears), None)
        if not queries or output is None or not any(f"{path}.{name}.weight" in dense for name in linears):
            continue
        shapes = {
            name: (dense.get(f"{path}.{name}.weight", c.weight.shape), c.weight.shape) for name, c in linears.items()
        }
        keys = [name for name in KEY_HEADS if isinstance(vars(module).get(name), int)]
        stock = getattr(module, queries[0])
        stock_keys = getattr(module, keys[0]) if keys else stock
        (_, before), (_, now) = shapes[output]
        heads = stock * now / before
        key = next((name for name in KEY_PROJECTIONS if name in linears), None)
        if key is not None:
            (before, _), (now, _) = shapes[key]
            key_heads = stock_keys * now / before
        elif now == before and len(linears) > 2:
            continue
        elif len(linears) > 2:
            raise ValueError(f"MLX-LM's attention {path} cannot lose heads; prune the FFNs only.")
        else:  # queries, keys and values in one projection
            (before, _), (now, _) = next(pair for name, pair in shapes.items() if name != output)
            key_heads = (now * (stock + 2 * stock_keys) / before - heads) / 2
        if heads % 1 or key_heads % 1 or heads % key_heads:
            raise ValueError(f"{path} keeps {heads:g} query heads for {key_heads:g} KV heads, which MLX-LM cannot say.")
        for names, value in ((queries, heads), (keys, key_heads), (["repeats"], heads // key_heads)):
            for name in names:
                if name in vars(module):
                    setattr(module, name, int(value))


def set_epsilons(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Set the epsilons of norms that span removed channels."""
    for path, attributes in structure.get("attributes", {}).items():
        for name in EPSILONS:
            if name in attributes:
                find(model, path)[1].eps = attributes[name]
