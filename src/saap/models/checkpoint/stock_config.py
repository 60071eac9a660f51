"""Stock configurations: which fields set the size of each role, and whether a uniform plan is valid.

No knowledge of families is needed: a changed configuration is built on the meta device, and the shapes of all
parameters are compared with the expected ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import torch
from torch import nn

from saap.core.errors import LayoutError
from saap.core.records import ConfigField, ModelGraph, Role, StructurePlan
from saap.models.checkpoint.layer_fields import text_part
from saap.models.checkpoint.pruned_structure import auto_class
from saap.models.structure.keep_index import KeepIndex, Shape
from saap.models.walk.walker import without_cache

MOST_FIELDS = 3
MOST_SIZES = 8
ADAPTIVE_REMEDY = "Use --layout adaptive"
# Numbers of leading layers that have no experts; the second is that of the first layer with experts.
FIRST_EXPERT_LAYER = "moe_layer_start_index"
DENSE_LAYERS = ("first_k_dense_replace", FIRST_EXPERT_LAYER, "num_dense_layers")
# Index of the last layer with experts; -1 is that of the model.
LAST_EXPERT_LAYER = "moe_layer_end_index"
# The width of one head: classes derive it from hidden size and heads unless the configuration sets it.
HEAD_WIDTH = "head_dim"


def keep_layers(config: Any, kept: Sequence[int], depth: int) -> None:
    """Set the number of layers to that of `kept`, and cut every list with one entry per layer (`depth` entries).

    Lists of layer indices and per-layer settings are renumbered, and the numbers of dense layers shortened. config: the
    decoder part of a transformers configuration.
    """
    own = config.to_dict().get("per_layer_config") or {}
    others = {"architectures"}
    with suppress(Exception):  # a class that requires arguments
        default: Any = type(config)()
        usual = getattr(default, "num_hidden_layers", None)
        # lists that by default are not per layer, such as a pair of limits
        others |= {
            name for name, value in vars(default).items() if isinstance(value, list | tuple) and len(value) != usual
        }
    for name, value in list(vars(config).items()):
        if not isinstance(value, list | tuple) or name.startswith("_") or name.endswith("token_id"):
            continue
        if "layer" in name and list(value) == [layer for layer in range(depth) if layer in value]:
            setattr(config, name, type(value)(new for new, layer in enumerate(kept) if layer in value))
        elif len(value) == depth and name not in others:
            setattr(config, name, type(value)(value[layer] for layer in kept))
    for name in DENSE_LAYERS:
        if isinstance(leading := getattr(config, name, None), int):
            setattr(config, name, sum(layer < leading for layer in kept))
    if isinstance(last := getattr(config, LAST_EXPERT_LAYER, None), int) and last >= 0:
        end = sum(layer <= last for layer in kept) - 1
        setattr(config, LAST_EXPERT_LAYER, max(0, end))
        if end < 0:  # all layers with experts were removed
            setattr(config, FIRST_EXPERT_LAYER, len(kept))
    config.num_hidden_layers = len(kept)
    if own:  # settings of single layers, by their numbers
        by_layer = {int(layer): settings for layer, settings in own.items()}
        config.per_layer_config = {new: by_layer[old] for new, old in enumerate(kept) if old in by_layer}


def stock_model(config: Any) -> Any:
    """A model of the transformers class of this configuration; its weights are placeholders."""
    return auto_class(str(getattr(config, "model_type", ""))).from_config(config)


@dataclass(frozen=True, slots=True)
class _Builder:
    """Builds models without weights from changed copies of a configuration.

    pinned: fields that keep their value when others change. depth: number of layers; the copies have `kept` of them.
    """

    make: Callable[[Any], Any]
    config: Any
    pinned: Mapping[str, int]
    depth: int = 1
    kept: int = 1

    def changed(self, fields: Sequence[ConfigField], sizes: Mapping[Role, int]) -> Any:
        """A copy with the fields of each role at its number of kept units."""
        changed = copy.deepcopy(self.config)
        text = text_part(changed)
        if self.kept < self.depth:
            keep_layers(text, range(self.kept), self.depth)
        for name, value in self.pinned.items():
            setattr(text, name, value)
        for field in fields:
            setattr(text, field.name, field.per_unit * sizes[field.role])
        return changed

    def shapes(
        self, fields: Sequence[ConfigField], sizes: Mapping[Role, int], *, run: bool = False
    ) -> dict[str, Shape] | str:
        """Shapes of the parameters, or why the classes reject the sizes. run: also run the model on a few tokens."""
        try:
            with torch.device("meta"):
                changed = self.changed(fields, sizes)
                model = self.make(type(changed).from_dict(changed.to_dict()))  # its class validates it again
                if run:
                    text = text_part(model.config)
                    text._attn_implementation = "eager"  # stricter
                    text._experts_implementation = "batched_mm"  # a loop over experts depends on values
                    ids = torch.zeros((1, 4), dtype=torch.long)
                    model(ids, attention_mask=torch.ones_like(ids), **without_cache(model))
        except Exception as error:  # each class raises its own errors for sizes
            return (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def runs(self, fields: Sequence[ConfigField], sizes: Mapping[Role, int]) -> bool:
        """Whether the model also runs with the sizes."""
        return isinstance(self.shapes(fields, sizes, run=True), dict)


def config_fields(model: nn.Module, graph: ModelGraph) -> tuple[tuple[ConfigField, ...], Mapping[str, int]]:
    """The configuration fields that set each role's size, and those to pin when others change.

    A role whose size no combination of fields can set is left out, as is every role of a model without a transformers
    configuration.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return (), {}
    pinned, depth = _pinned(text_part(config)), len(graph.blocks)
    for kept in (_enough_layers(graph), depth):  # a shallow model is faster to build, if the classes accept it
        stock = _Builder(type(model), config, {}, depth, kept).shapes((), {})
        if not isinstance(stock, str) and stock.items() <= graph.shapes.items():
            builder = _Builder(type(model), config, pinned, depth, kept)
            found = [field for role in Role for field in _fields_of(role, builder, graph)]
            return tuple(found), pinned if any(field.role is not Role.FFN for field in found) else {}
    return (), {}


def _enough_layers(graph: ModelGraph) -> int:
    """Number of the first layers that have every role together; the first ones may have no experts."""
    firsts = [min(group.layer for group in graph.of_role(role)) for role in {group.role for group in graph.groups}]
    return 1 + max(0, *firsts)


def _pinned(config: Any) -> dict[str, int]:
    names = (HEAD_WIDTH, "num_attention_heads", "hidden_size")
    differ = set(getattr(config, "per_layer_attributes", None) or ())
    if isinstance(getattr(type(config), HEAD_WIDTH, None), property) or not differ.isdisjoint(names):
        return {}
    width, heads, hidden = (getattr(config, name, None) for name in names)
    if not isinstance(width, int) and isinstance(heads, int) and isinstance(hidden, int):
        width = hidden // heads
    return {HEAD_WIDTH: width} if isinstance(width, int) else {}


def _fields_of(role: Role, builder: _Builder, graph: ModelGraph) -> list[ConfigField]:
    groups = graph.of_role(role)
    if len({group.units for group in groups}) != 1:
        return []
    units = groups[0].units
    # numbers of kept units to try; classes may require that some divide others
    sizes = sorted({units - 1, units // 2} - {0}, reverse=True)
    if role is Role.ATTENTION:
        sizes = list(range(units - 1, max(0, units - 1 - MOST_SIZES), -1))
    owned = {member.tensor for group in groups for member in group.members}
    candidates = [
        ConfigField(role=role, name=name, per_unit=value // units)
        for name, value in text_part(builder.changed((), {})).to_dict().items()
        if type(value) is int and value >= units and value % units == 0
        if name not in (HEAD_WIDTH, "vocab_size") and not name.endswith("token_id")
    ]

    def changes(field: ConfigField, size: int) -> set[str] | None:
        """Tensors that get another size; None if the class rejects it."""
        built = builder.shapes([field], {role: size})
        # A field may also add tensors that the model does not have (OPT's projections); `fits` rejects those.
        here = graph.shapes
        return (
            None if isinstance(built, str) else {name for name in built if built[name] != here.get(name, built[name])}
        )

    def fits(fields: Sequence[ConfigField], size: int) -> bool | None:
        """Whether exactly the group's sizes change; None if the class rejects it."""
        built = builder.shapes(fields, {role: size})
        wanted = KeepIndex.of(graph, {group.name: size for group in groups}).shapes
        return None if isinstance(built, str) else built.items() <= wanted.items()

    runs = builder.runs((), {})
    for size in sizes:
        changed = {field: changes(field, size) for field in candidates}
        useful = [field for field, names in changed.items() if names is None or (names and names <= owned)]
        silent = [field for field, names in changed.items() if names == set()]  # may have to match the others
        for fields in (found for count in range(1, MOST_FIELDS + 1) for found in combinations(useful, count)):
            if fits(fields, size) and all(fits(fields, other) is not False for other in sizes):
                choices = [[*fields], *([*fields, other] for other in silent)]
                return next((one for one in choices if not runs or builder.runs(one, {role: size})), [])
    return []


def uniform_config(config: Any, graph: ModelGraph, plan: StructurePlan) -> Any:
    """A copy of `config` whose stock model has exactly the shapes after the plan.

    config: of the dense model, with or without the plan's dropped blocks. Raises LayoutError, with supported sizes, if
    sizes differ between layers or the family cannot be built with them.
    """
    if not hasattr(config, "to_dict"):
        raise LayoutError("The model has no transformers configuration", ADAPTIVE_REMEDY)
    family = str(getattr(config, "model_type", None) or type(config).__name__)
    sizes = {role: size for role in Role if (size := _size_of(role, graph, plan)) is not None}
    roles = list(dict.fromkeys(field.role for field in graph.config_fields))
    held = f"it supports some sizes of {' and '.join(roles)}" if roles else "it supports no other sizes"
    remedy = f"{ADAPTIVE_REMEDY}; as a stock model {held}"
    unsaid = [role for role in sizes if role not in roles]
    if unsaid:
        raise LayoutError(f"{family} has no configuration for fewer {unsaid[0]} units", remedy)
    fields = [field for field in graph.config_fields if field.role in sizes]
    builder = _Builder(stock_model, config, graph.pinned_fields if sizes else {})
    built = builder.shapes(fields, sizes)
    if isinstance(built, str):
        wanted = ", ".join(f"{size} {role} units" for role, size in sizes.items())
        near = _nearest(config, graph, sizes)
        raise LayoutError(
            f"{family} cannot be built with {wanted}: {built}",
            f"{ADAPTIVE_REMEDY}, or keep {near} units in every layer" if near else remedy,
        )
    every = KeepIndex.of(graph, plan.keep).shapes
    shapes = graph.renamed(plan.dropped_blocks, every)
    if len(built) > len(shapes):  # the configuration still counts the dropped blocks
        shapes = every
    for name in {**shapes, **built}:
        if built.get(name) != shapes.get(name):
            raise LayoutError(
                f"The stock {family} would have the shape {built.get(name)} of {name}, not {shapes.get(name)}", remedy
            )
    return builder.changed(fields, sizes)


def _size_of(role: Role, graph: ModelGraph, plan: StructurePlan) -> int | None:
    """Number of kept units in each group of the role; None if all are kept."""
    groups = [group for group in graph.of_role(role) if group.layer not in plan.dropped_blocks]
    sizes = sorted({len(plan.kept(group)) for group in groups})
    if all(len(plan.kept(group)) == group.units for group in groups):
        return None
    if len(sizes) > 1:
        raise LayoutError(
            f"The plan keeps different numbers of {role} units: {sizes[0]} to {sizes[-1]}", ADAPTIVE_REMEDY
        )
    return sizes[0]


def _nearest(config: Any, graph: ModelGraph, sizes: Mapping[Role, int]) -> str | None:
    """The supported sizes closest to a rejected one."""
    if len(sizes) > 1:
        return None
    ((role, size),) = sizes.items()
    fields = [field for field in graph.config_fields if field.role is role]
    builder = _Builder(stock_model, config, graph.pinned_fields, len(graph.blocks), _enough_layers(graph))
    near: list[str] = []
    for side in (range(size - 1, 0, -1), range(size + 1, graph.of_role(role)[0].units)):
        legal = (str(other) for other in side if not isinstance(builder.shapes(fields, {role: other}), str))
        near += islice(legal, 1)
    return f"{' or '.join(near)} {role}" if near else None
