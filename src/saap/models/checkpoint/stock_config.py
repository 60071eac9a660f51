"""What a family's stock configuration can say: which fields size which role, and whether a uniform plan is legal.

Nothing is known about families: a configuration is changed, the model built from it on the meta device, and the
shapes of all parameters compared with those wanted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from saap.core.errors import LayoutError
from saap.core.records import ConfigField, ModelGraph, Role, StructurePlan
from saap.models.checkpoint.modeling_pruned import auto_classes
from saap.models.structure.keep_index import KeepIndex
from saap.models.walk.walker import without_cache

Shapes = dict[str, tuple[int, ...]]
Builder = Callable[[Callable[[], Any], bool], Shapes | None]
"""Gives the shapes of the model of a configuration; None where its class refuses it, or the model, run, fails."""

MOST_FIELDS = 3
MOST_SIZES = 8
ADAPTIVE_REMEDY = "Use --layout adaptive"
# The width of one head: classes derive it from hidden size and heads unless the configuration gives it.
HEAD_WIDTH = "head_dim"


def config_fields(model: nn.Module, graph: ModelGraph) -> tuple[tuple[ConfigField, ...], Mapping[str, int]]:
    """The configuration fields that say each role's size, and those to pin to their value when others change.

    A role whose size no combination of fields can say is left out, as is every role of a model without a
    transformers configuration.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return (), {}
    pinned = _pinned(text_part(config))
    probe = _shallow(model, config, graph)
    if probe is None:
        return (), {}
    small, shapes_of = probe
    found = [field for role in Role for field in _fields_of(role, small, graph, pinned, shapes_of)]
    narrower = any(field.role is not Role.FFN for field in found)
    return tuple(found), pinned if narrower else {}


def text_part(config: Any) -> Any:
    """What describes the decoder in a transformers configuration: all of it, or its part in models of several parts."""
    find = getattr(config, "get_text_config", None)
    return config if find is None else find()


def keep_layers(config: Any, kept: Sequence[int], depth: int) -> None:
    """Set the number of layers to that of `kept`, and cut every list with one entry for each of `depth` layers.

    Lists of layers' numbers, and settings by layer, are numbered anew. config: the part of a transformers
    configuration that describes the decoder.
    """
    own = config.to_dict().get("per_layer_config") or {}
    others = {"architectures", *_other_lists(type(config))}
    for name, value in list(vars(config).items()):
        if not isinstance(value, list | tuple) or name.startswith("_") or name.endswith("token_id"):
            continue
        if len(value) == depth and name not in others:
            setattr(config, name, type(value)(value[layer] for layer in kept))
        elif "layer" in name and list(value) == [layer for layer in range(depth) if layer in value]:
            setattr(config, name, type(value)(new for new, layer in enumerate(kept) if layer in value))
    config.num_hidden_layers = len(kept)
    if own:  # settings of single layers, by their numbers
        by_layer = {int(layer): settings for layer, settings in own.items()}
        config.per_layer_config = {new: by_layer[old] for new, old in enumerate(kept) if old in by_layer}


def _other_lists(config_class: type) -> list[str]:
    """Names of the lists that by default are not as long as the class has layers, such as a pair of limits."""
    try:
        default: Any = config_class()
    except Exception:  # a class that cannot do without arguments
        return []
    depth = getattr(default, "num_hidden_layers", None)
    return [name for name, value in vars(default).items() if isinstance(value, list | tuple) and len(value) != depth]


def stock_model(config: Any) -> Any:
    """A model of the class that transformers opens folders of this configuration with; its weights mean nothing yet."""
    known = auto_classes(str(getattr(config, "model_type", "")))
    return (known[0][0] if known else AutoModelForCausalLM).from_config(config)


def uniform_config(config: Any, graph: ModelGraph, plan: StructurePlan) -> Any:
    """A copy of `config` whose stock model has exactly the shapes that the plan leaves.

    config: of the dense model, or of one that has already lost the plan's dropped blocks. Raises LayoutError if the
    plan gives the layers different sizes, or the family cannot be built with these sizes; it says what can.
    """
    if not hasattr(config, "to_dict"):
        raise LayoutError("The model has no transformers configuration", ADAPTIVE_REMEDY)
    sizes = {role: size for role in Role if (size := _size_of(role, graph, plan)) is not None}
    fields = [field for field in graph.config_fields if field.role in sizes]
    unsaid = [str(role) for role in sizes if all(field.role is not role for field in fields)]
    if unsaid:
        raise LayoutError(f"{_family(config)} has no configuration for fewer {unsaid[0]} units", _can_hold(graph))
    changed = _changed(config, graph.pinned_fields if sizes else {}, fields, sizes)
    built, reason = _built(lambda: stock_model(_valid(changed)))
    if built is None:
        wanted = ", ".join(f"{size} {role} units" for role, size in sizes.items())
        raise LayoutError(
            f"{_family(config)} cannot be built with {wanted}: {reason}",
            _nearest(config, graph, sizes) or _can_hold(graph),
        )
    _compare(built, graph, plan, _family(config))
    return changed


def _nearest(config: Any, graph: ModelGraph, sizes: Mapping[Role, int]) -> str | None:
    """The sizes next to a single one that the family refuses, as a remedy."""
    if len(sizes) > 1:
        return None
    ((role, size),) = sizes.items()
    fields = [field for field in graph.config_fields if field.role is role]
    small = _shortened(config, len(graph.blocks), 1)

    def legal(other: int) -> bool:
        changed = _changed(small, graph.pinned_fields, fields, {role: other})
        return _built(lambda: stock_model(_valid(changed)))[0] is not None

    below = next((other for other in range(size - 1, 0, -1) if legal(other)), None)
    above = next((other for other in range(size + 1, graph.of_role(role)[0].units) if legal(other)), None)
    near = " or ".join(str(other) for other in (below, above) if other is not None)
    return f"{ADAPTIVE_REMEDY}, or keep {near} {role} units in every layer" if near else None


def _size_of(role: Role, graph: ModelGraph, plan: StructurePlan) -> int | None:
    """Units that the plan keeps in each group of the role; None where it keeps all."""
    groups = [group for group in graph.of_role(role) if group.layer not in plan.dropped_blocks]
    sizes = sorted({len(plan.kept(group)) for group in groups})
    if all(len(plan.kept(group)) == group.units for group in groups):
        return None
    if len(sizes) > 1:
        raise LayoutError(
            f"The plan keeps different numbers of {role} units: {sizes[0]} to {sizes[-1]}", ADAPTIVE_REMEDY
        )
    return sizes[0]


def _compare(built: Shapes, graph: ModelGraph, plan: StructurePlan, family: str) -> None:
    pruned = KeepIndex.of(graph, plan.keep)
    names = {name: graph.name_without(plan.dropped_blocks, name) for name in graph.shapes}
    wanted = {new: pruned.shape(name) for name, new in names.items() if new is not None}
    if len(built) > len(wanted):  # the configuration still counts the dropped blocks
        wanted = pruned.shapes
    wrong = [name for name in wanted if built.get(name) != wanted[name]]
    if wrong or len(built) != len(wanted):
        name = wrong[0] if wrong else next(name for name in built if name not in wanted)
        raise LayoutError(
            f"The stock {family} would give {name} the sizes {built.get(name)}, not {wanted.get(name)}",
            _can_hold(graph),
        )


def _can_hold(graph: ModelGraph) -> str:
    roles = [str(role) for role in Role if any(field.role is role for field in graph.config_fields)]
    held = f"of {' and '.join(roles)} it can hold some sizes" if roles else "it can hold no other sizes"
    return f"{ADAPTIVE_REMEDY}; as a stock model {held}"


def _family(config: Any) -> str:
    return str(getattr(config, "model_type", None) or type(config).__name__)


def _pinned(config: Any) -> dict[str, int]:
    names = (HEAD_WIDTH, "num_attention_heads", "hidden_size")
    differ = set(getattr(config, "per_layer_attributes", None) or ())
    if isinstance(getattr(type(config), HEAD_WIDTH, None), property) or not differ.isdisjoint(names):
        return {}
    width, heads, hidden = (getattr(config, name, None) for name in names)
    if not isinstance(width, int) and isinstance(heads, int) and isinstance(hidden, int):
        width = hidden // heads
    return {HEAD_WIDTH: width} if isinstance(width, int) else {}


def _valid(config: Any) -> Any:
    """The configuration made anew from its fields, so that its class judges them."""
    return type(config).from_dict(config.to_dict())


def _shallow(model: nn.Module, config: Any, graph: ModelGraph) -> tuple[Any, Builder] | None:
    """A configuration of few blocks that gives the graph's shapes, and the way to build it; None if there is none."""
    depth = len(graph.blocks)

    def shapes_of(changed: Callable[[], Any], run: bool) -> Shapes | None:
        return _built(lambda: type(model)(_valid(changed())), run=run)[0]

    for kept in (1, depth):
        try:
            small = _shortened(config, depth, kept)
        except Exception:  # a class that takes no other number of layers
            continue
        built = shapes_of(lambda: small, False)  # noqa: B023 - called at once
        if built and all(graph.shapes.get(name) == shape for name, shape in built.items()):
            return small, shapes_of
    return None


def _shortened(config: Any, depth: int, kept: int) -> Any:
    """A copy of the configuration of `depth` blocks with the first `kept` alone."""
    small = copy.deepcopy(config)
    if kept < depth:
        keep_layers(text_part(small), range(kept), depth)
    return small


def _fields_of(
    role: Role, config: Any, graph: ModelGraph, pinned: Mapping[str, int], shapes_of: Builder
) -> list[ConfigField]:
    groups = graph.of_role(role)
    if not groups or len({group.units for group in groups}) > 1:
        return []
    units = groups[0].units
    owned = {member.tensor for group in groups for member in group.members}

    def built_with(fields: Sequence[ConfigField], size: int, run: bool = False) -> Shapes | None:
        return shapes_of(lambda: _changed(config, pinned, fields, {role: size}), run)

    def fits(fields: Sequence[ConfigField], size: int) -> bool | None:
        """Whether exactly the group's sizes follow; None where the class refuses."""
        built = built_with(fields, size)
        wanted = KeepIndex.of(graph, {group.name: size for group in groups}).shapes
        return None if built is None else all(wanted.get(name) == shape for name, shape in built.items())

    run = shapes_of(lambda: config, True) is not None
    for size in _sizes(role, units):
        useful, silent = [], []
        for field in _candidates(role, config, units):
            built = built_with([field], size)
            # A field may also bring in tensors that the model does not have (OPT's projections); `fits` refuses those.
            changed = {name for name, shape in (built or {}).items() if graph.shapes.get(name, shape) != shape}
            if not built or (changed and changed <= owned):
                useful.append(field)
            elif not changed:  # it may still have to agree with one of the others
                silent.append(field)
        for fields in (found for count in range(1, MOST_FIELDS + 1) for found in combinations(useful, count)):
            if fits(fields, size) and all(fits(fields, other) is not False for other in _sizes(role, units)):
                choices = [list(fields), *([*fields, other] for other in silent)]
                return next((choice for choice in choices if not run or built_with(choice, size, run)), [])
    return []


def _sizes(role: Role, units: int) -> Iterator[int]:
    """Numbers of kept units to try; classes may demand that some divide others."""
    if role is Role.ATTENTION:
        yield from range(units - 1, max(0, units - 1 - MOST_SIZES), -1)
    elif units > 1:
        yield from dict.fromkeys((units - 1, units // 2))


def _candidates(role: Role, config: Any, units: int) -> list[ConfigField]:
    return [
        ConfigField(role=role, name=name, per_unit=value // units)
        for name, value in text_part(config).to_dict().items()
        if isinstance(value, int)
        and not isinstance(value, bool)
        and value >= units
        and value % units == 0
        and name not in (HEAD_WIDTH, "vocab_size")
        and not name.endswith("token_id")
    ]


def _changed(config: Any, pinned: Mapping[str, int], fields: Sequence[ConfigField], sizes: Mapping[Role, int]) -> Any:
    """A copy of the configuration with the fields of each role at its number of kept units."""
    changed = copy.deepcopy(config)
    text = text_part(changed)
    for name, value in pinned.items():
        setattr(text, name, value)
    for field in fields:
        setattr(text, field.name, field.per_unit * sizes[field.role])
    return changed


def _built(build: Callable[[], nn.Module], *, run: bool = False) -> tuple[Shapes | None, str]:
    """Shapes of a model built without weights, or None and why it cannot be built, or run on a few tokens."""
    try:
        with torch.device("meta"):
            model: Any = build()
            if run:
                text_part(model.config)._attn_implementation = "eager"  # fused kernels take what it refuses
                ids = torch.zeros((1, 4), dtype=torch.long)
                model(ids, attention_mask=torch.ones_like(ids), **without_cache(model))
    except Exception as error:  # every class has its own way to refuse sizes
        return None, (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, ""
