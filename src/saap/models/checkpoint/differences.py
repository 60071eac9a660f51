"""What an adaptive checkpoint records: how a pruned model differs from the stock class built from its configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from saap.core.records import Digested, ModelGraph, SlicedArgument, StructurePlan
from saap.models.checkpoint.modeling_pruned import (
    AUTO_CLASSES,
    FIRST_FORMAT_VERSION,
    SECOND_FORMAT_VERSION,
    ArgumentSlice,
    ConstantOutput,
    SaapPrunedConfig,
    SaapPrunedForCausalLM,
    auto_classes,
    pruned_classes,
)

EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedStructure(Digested):
    """Sizes and attributes that the stock configuration cannot say.

    base_model_type: the stock model's type. shapes: of every parameter that lost something. attributes: module path
    -> name -> value (heads, norm epsilons). constant: modules that lost all inputs or outputs: path -> width of their
    output and whether a bias stays. sliced_arguments: module path -> the argument with one entry per head and the
    kept heads. added_biases: biases of linear modules that the stock class lacks. Dropped blocks are not here: the
    configuration says how many blocks there are, names count them anew.
    """

    base_model_type: str
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    constant: Mapping[str, Mapping[str, int | bool]] = field(default_factory=dict)
    sliced_arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    added_biases: tuple[str, ...] = ()

    def to_config(self) -> dict[str, Any]:
        """The `pruned_structure` field of config.json."""
        added = {"added_biases": list(self.added_biases)} if self.added_biases else {}
        return {
            "format_version": SECOND_FORMAT_VERSION if added else FIRST_FORMAT_VERSION,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": {path: dict(values) for path, values in self.attributes.items()},
            "constant": {path: dict(values) for path, values in self.constant.items()},
            "sliced_arguments": {path: dict(values) for path, values in self.sliced_arguments.items()},
            **added,
        }

    @property
    def is_empty(self) -> bool:
        """Whether the stock class loads the model as it is."""
        return not (self.shapes or self.attributes or self.constant or self.sliced_arguments or self.added_biases)


def auto_class_name(base_model_type: str) -> str:
    """Name of the auto class of transformers that opens models of this type."""
    known = auto_classes(base_model_type) or AUTO_CLASSES[:1]
    return str(known[0][0].__name__)


def removed_modules(model: nn.Module) -> list[str]:
    """Paths of the modules of a pruned model that have lost all their weights.

    An adapter has nothing to hold on to there: where peft's `target_modules` are named, these go into its
    `exclude_modules`.
    """
    return [path for path, module in model.named_modules() if isinstance(module, ConstantOutput)]


def read_attribute(module: nn.Module, name: str) -> Any:
    """Value of an attribute as UnitAttribute names it: `config.NAME` is in the module's copy of the configuration."""
    holder: Any = module
    if name.startswith("config."):
        holder, name = module.config, name.removeprefix("config.")
    return getattr(holder, name)


def epsilon_name(norm: nn.Module) -> str | None:
    """Name of the attribute that holds a norm's epsilon; None if there is none."""
    return next((name for name in EPSILON_NAMES if hasattr(norm, name)), None)


def dense_shapes(graph: ModelGraph, plan: StructurePlan) -> dict[str, tuple[int, ...]]:
    """Shapes of the dense model's parameters, without the plan's dropped blocks, by their names after the cut."""
    names = _names_after(graph, plan, graph.shapes)
    return {new: graph.shapes[name] for name, new in names.items()}


def _names_after(graph: ModelGraph, plan: StructurePlan, names: Iterable[str]) -> dict[str, str]:
    """Names after the cut, by the old ones; without those inside dropped blocks."""
    found = {name: graph.name_without(plan.dropped_blocks, name) for name in names}
    return {name: new for name, new in found.items() if new is not None}


def structure_of(model: nn.Module, graph: ModelGraph, plan: StructurePlan) -> PrunedStructure:
    """Describe a model that was cut by `plan`; everything is read from the model itself.

    graph: of the dense model. model: with the plan's dropped blocks already gone.
    """
    dense = dense_shapes(graph, plan)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name in dense and tuple(parameter.shape) != dense[name]
    }
    attributes = _attributes(model, graph, plan)
    config: Any = getattr(model, "config", None)
    earlier = getattr(config, "pruned_structure", None)
    if earlier is not None:
        _add_earlier(earlier, graph, plan, shapes, attributes)
    constant: dict[str, dict[str, int | bool]] = {}
    sliced: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        if isinstance(module, ConstantOutput):
            constant[path] = {"width": module.width, "bias": module.bias is not None}
        hook = argument_slice(module)
        if hook is not None:
            sliced[path] = hook.describe()
    return PrunedStructure(
        base_model_type=str(getattr(config, "base_model_type" if earlier else "model_type", "")),
        shapes=shapes,
        attributes=attributes,
        constant=constant,
        sliced_arguments=sliced,
        added_biases=_added_biases(model, graph, plan, constant, earlier),
    )


def _added_biases(
    model: nn.Module, graph: ModelGraph, plan: StructurePlan, constant: Mapping[str, Any], earlier: Any
) -> tuple[str, ...]:
    """Biases that the stock class lacks: those that the dense model had not, and those that it had been given."""
    given = earlier.get("added_biases", ()) if earlier is not None else ()
    before = set(_names_after(graph, plan, given).values())
    stock = set(dense_shapes(graph, plan)) - before
    return tuple(
        name
        for name, _ in model.named_parameters()
        if name.endswith(".bias") and name not in stock and name.removesuffix(".bias") not in constant
    )


def argument_hook(module: nn.Module, sliced: SlicedArgument, units: int, kept: Sequence[int]) -> ArgumentSlice:
    """The hook that cuts an argument of the module to the kept ones of its units."""
    return ArgumentSlice(
        module, argument=sliced.argument, axis=sliced.axis, per_sample=sliced.per_sample, units=units, kept=kept
    )


def argument_slice(module: nn.Module) -> ArgumentSlice | None:
    """The hook that cuts an argument of the module to the kept heads, if it has one."""
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, ArgumentSlice)), None)


def _add_earlier(
    earlier: Mapping[str, Any],
    graph: ModelGraph,
    plan: StructurePlan,
    shapes: dict[str, tuple[int, ...]],
    attributes: dict[str, dict[str, float]],
) -> None:
    """What an earlier pruning of the same model changed and this one did not touch."""
    for name, new in _names_after(graph, plan, earlier["shapes"]).items():
        shapes.setdefault(new, tuple(earlier["shapes"][name]))
    for path, new in _names_after(graph, plan, earlier["attributes"]).items():
        attributes[new] = {**earlier["attributes"][path], **attributes.get(new, {})}


def mark_pruned(model: nn.Module, structure: PrunedStructure) -> None:
    """Let `save_pretrained` of a cut transformers model write a folder that opens again, in place.

    The model gets the class that an adaptive checkpoint has, and its configuration the `pruned_structure`. A model
    whose class transformers' auto classes do not know stays as it is.
    """
    config: Any = getattr(model, "config", None)
    try:
        config_class, model_class = pruned_classes(structure.base_model_type)
    except ValueError:
        return
    if not issubclass(model_class, type(model)):
        return
    config.__class__ = config_class
    model.__class__ = model_class
    for name, value in pruned_fields(structure).items():
        setattr(config, name, value)


def pruned_fields(structure: PrunedStructure) -> dict[str, Any]:
    """The fields by which the configuration of an adaptive checkpoint differs from the stock one."""
    module = SaapPrunedConfig.__module__.rpartition(".")[2]
    known = auto_classes(structure.base_model_type) or AUTO_CLASSES[:1]
    return {
        "base_model_type": structure.base_model_type,
        "pruned_structure": structure.to_config(),
        "architectures": [SaapPrunedForCausalLM.__name__],
        "auto_map": {
            "AutoConfig": f"{module}.{SaapPrunedConfig.__name__}",
            **{auto.__name__: f"{module}.{SaapPrunedForCausalLM.__name__}" for auto, _ in known},
        },
    }


def _attributes(model: nn.Module, graph: ModelGraph, plan: StructurePlan) -> dict[str, dict[str, float]]:
    """The attributes that follow the kept units, and the epsilons of rescaled norms."""
    found: dict[str, dict[str, float]] = {}
    for group in graph.groups:
        if group.layer in plan.dropped_blocks or len(plan.kept(group)) == group.units:
            continue
        modules = [*(attribute.module for attribute in group.attributes), *group.scaled_norms]
        paths = _names_after(graph, plan, modules)
        for attribute in group.attributes:
            if attribute.module in paths:
                value = attribute.value(len(plan.kept(group)))
                found.setdefault(paths[attribute.module], {})[attribute.attribute] = value
        for path in (paths[norm] for norm in group.scaled_norms if norm in paths):
            module = model.get_submodule(path)
            name = epsilon_name(module)
            if name is not None and not isinstance(module, ConstantOutput):
                found.setdefault(path, {})[name] = getattr(module, name)
    return found
