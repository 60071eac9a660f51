"""Propagation rules of channel tags, one for each kind of operation.

Data movement is applied to the tags themselves. Element-wise operations tie their operands, contractions tie the summed
axes, and reductions are recorded. An operation without a rule stops the channels of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from saap.core.errors import UnsupportedModelError
from saap.discovery.tags import UNTAGGED, Choice, ParameterTags, TagSpace, finest

Rule = Callable[["Operation"], Any]
_MOVES = (
    "broadcast_to cat chunk diagonal expand expand_as flatten flip getitem index_select movedim mT narrow numpy_T "
    "permute repeat repeat_interleave roll select slice split split_with_sizes squeeze stack swapaxes swapdims t "
    "tensor_split transpose unbind unflatten unfold unsqueeze"
)
_VIEWS = "view reshape reshape_as _unsafe_view view_as"
# A tensor without channels may be filled through a view, so views of tags share memory as in the model.
# Selections among values without channels are recorded too.
_ALWAYS = frozenset(f"{_MOVES} {_VIEWS} topk".split())


class Operation:
    """One operation of the graph, with tags in place of tensors.

    arguments, keywords: as in the graph. named: all arguments by their names in the operation's schema. output: the
    result in the graph (meta tensors). module: path of its module. constants: values of nodes that do not depend on the
    input.
    """

    def __init__(self, node: Node, space: TagSpace, tags: Mapping[Node, Any], constants: Mapping[Node, Tensor]) -> None:
        self.node, self.space, self.constants = node, space, constants
        self.name = operation_name(node)
        self.output: Any = node.meta.get("val")
        modules = node.meta.get("nn_module_stack") or {}
        self.module = str(next(reversed(modules.values()))[0]) if modules else ""
        self.where = f"{self.name} in {self.module or 'the model'}"
        self.arguments: Any = map_arg(node.args, tags.get)
        self.keywords: Any = map_arg(node.kwargs, tags.get)
        self.first: Any = self.arguments[0] if self.arguments else None
        schema = getattr(node.target, "_schema", None)
        self.in_place = bool(getattr(schema, "is_mutable", False))
        expected = getattr(schema, "arguments", ())
        self.named = {each.name: each.default_value for each in expected if each.has_default_value()}
        self.named |= {each.name: value for each, value in zip(expected, self.arguments, strict=False)} | self.keywords

    def run(self, *arguments: Any, **keywords: Any) -> Any:
        """The operation itself, on these arguments."""
        return self.node.target(*arguments, **keywords)  # type: ignore[operator]


def operation_name(node: Node) -> str:
    """Name of the function that a node calls, without the underscore of in-place operations."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", node.target))
    name: str = schema.name.split("::")[1]
    return name.rstrip("_") if not name.startswith("__") else name


def tags_after(operation: Operation) -> Any:
    """Tags of the result of an operation, in the structure of the result.

    Raises UnsupportedModelError if the size of the result depends on data.
    """
    sizes = [size for item in tree_leaves(operation.output) for size in getattr(item, "shape", ())]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        raise UnsupportedModelError(
            f"The output size of {operation.where} depends on the text",
            "Use a model whose tensor sizes follow from the input size",
        )
    if operation.output is None:  # an assertion
        return None
    tensors = _tensors(operation)
    parameters = any(isinstance(value, ParameterTags) for value in tensors)
    if not any(_is_tagged(value) for value in tensors) and operation.name not in _ALWAYS:
        return untagged(operation.output)
    rule = (PARAMETER_RULES if parameters else RULES).get(operation.name)
    if rule is None and _is_pointwise(operation):
        rule = _elementwise
    if rule is not None:
        try:
            result = rule(operation)
            if operation.in_place and bool((operation.first < 0).any()):  # it also fills the base tensor of this view
                operation.first.copy_(torch.where(operation.first < 0, result, operation.first))
            return result
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError):
            pass  # a use that the rule does not cover: rejected below, by name
    for value in tensors:
        for axis in value.axes if isinstance(value, ParameterTags) else (value,):
            operation.space.stops.append((axis, f"the operation {operation.where} has no rule"))
    return untagged(operation.output)


def untagged(output: Any) -> Any:
    """Empty tags in the structure of `output`."""
    return tree_map(lambda item: torch.full(item.shape, UNTAGGED) if isinstance(item, Tensor) else None, output)


def _tensors(operation: Operation) -> list[Tensor | ParameterTags]:
    every = tree_leaves((operation.arguments, operation.keywords))
    return [value for value in every if isinstance(value, (Tensor, ParameterTags))]


def _is_tagged(tags: Tensor | ParameterTags) -> bool:
    return isinstance(tags, ParameterTags) or bool((tags >= 0).any())


def _is_pointwise(operation: Operation) -> bool:
    """Whether the operation is element-wise; torch tags only some of its overloads so."""
    packet = getattr(operation.node.target, "overloadpacket", None)
    overloads = () if packet is None else (getattr(packet, name) for name in packet.overloads())
    return isinstance(operation.output, Tensor) and any(torch.Tag.pointwise in each.tags for each in overloads)


def _move(operation: Operation) -> Any:
    return operation.run(*operation.arguments, **operation.keywords)


def _view_as_complex(operation: Operation) -> Any:
    """Tie the channels of real and imaginary part."""
    operation.space.tie_along(operation.first, -1)
    return operation.first.select(-1, 0)


def _meeting(operation: Operation, tags: Tensor, *others: Tensor) -> Tensor:
    """Tie the channels that meet at one element; the others broadcast to the shape of `tags`."""
    for other in (other.expand(tags.shape) for other in others):
        operation.space.tie_shared(other, tags)
        tags = torch.where(tags < 0, other, tags)
    return tags


def _elementwise(operation: Operation) -> Tensor:
    tagged = [item for item in _tensors(operation) if _is_tagged(item)]
    # A parameter used like an activation has its channels along the last axis.
    result, *others = finest([item.axes[-1] if isinstance(item, ParameterTags) else item for item in tagged])
    return _meeting(operation, result.expand(operation.output.shape), *others)


def _mix(operation: Operation) -> Any:
    """Softmax, cumulative sums: every channel along the axis affects all others."""
    operation.space.tie_along(operation.first, operation.named["dim"])
    if "softmax" in operation.name:
        operation.space.mark("softmax", operation.first)
    return operation.first


def _reduce(operation: Operation) -> Any:
    """A statistic over some axes; inside one unit it keeps the tag. max and min of two tensors are not reductions."""
    if "other" in operation.named:
        return _elementwise(operation)
    tags: Tensor = operation.first
    dims = operation.named.get("dim")
    chosen = range(tags.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    axes = sorted(axis % tags.ndim for axis in chosen)
    keep = bool(operation.named.get("keepdim"))
    low, high = tags.amin(axes, keepdim=keep), tags.amax(axes, keepdim=keep)
    if isinstance(operation.output, Tensor) and torch.equal(low, high):
        return low
    last = tags.movedim(axes, list(range(-len(axes), 0)))
    if operation.name == "max" and len(axes) == 1:
        _note_choice(operation, 1, last)
    squares = operation.name == "mean" and _is_square(operation.node.args[0])
    _note_reduction(operation, "rms" if squares else operation.name, last.flatten(-len(axes)))
    return untagged(operation.output)


def _note_reduction(operation: Operation, kind: str, channels: Tensor) -> None:
    """channels: (..., channels), over which the statistic is taken."""
    rows = torch.unique(channels.reshape(-1, channels.shape[-1]), dim=0)
    operation.space.reductions.append((kind, operation.module, rows))


def _is_square(argument: Any) -> bool:
    """Whether a node of the graph is x^2, possibly after a change of type."""
    while isinstance(argument, Node) and operation_name(argument) in ("to", "_to_copy", "float"):
        argument = argument.args[0]
    if not isinstance(argument, Node) or argument.op != "call_function":
        return False
    name, (base, *others) = operation_name(argument), argument.args
    return name == "square" or (name == "pow" and others == [2]) or (name == "mul" and others[0] is base)


def _norm(operation: Operation) -> Tensor:
    kind = "rms" if operation.name == "rms_norm" else operation.name
    _note_reduction(operation, kind, operation.first.flatten(-len(operation.named["normalized_shape"])))
    parameters = (operation.named.get(name) for name in ("weight", "bias"))
    return _meeting(operation, operation.first, *(each for each in parameters if isinstance(each, Tensor)))


def _matmul(operation: Operation) -> Tensor:
    """The product of two activations, and what is added to it."""
    *added, first, second = operation.arguments
    if first.ndim < 2 or second.ndim < 2:
        raise ValueError("a vector")
    return _meeting(operation, operation.space.contract(first, second), *added)


def _attention(operation: Operation) -> Tensor:
    query, key, value = (operation.named[name] for name in ("query", "key", "value"))
    repeats = query.shape[-3] // key.shape[-3]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = operation.space.contract(query, key.transpose(-1, -2))
    operation.space.mark("softmax", scores)
    return operation.space.contract(scores, value)


def _einsum(operation: Operation) -> Tensor:
    """Product of two activations: every element of the result is a dot product along the summed axes."""
    equation, (first, second) = operation.first.replace(" ", ""), operation.arguments[1]
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    summed = [axis for axis in left if axis in right and axis not in result]
    size = dict(zip(left + right, (*first.shape, *second.shape), strict=True))
    if not summed or "." in equation or set(left + right) - set(result) - set(summed):
        raise ValueError(equation)

    def aligned(tags: Tensor, axes: str) -> Tensor:
        order = [axes.index(axis) for axis in (*result, *summed) if axis in axes]
        return tags.permute(order).reshape([size[axis] if axis in axes else 1 for axis in result] + [-1])

    product = operation.space.contract(aligned(first, left).unsqueeze(-2), aligned(second, right).unsqueeze(-1))
    return product[..., 0, 0]


def _index(operation: Operation) -> Any:
    """Data-dependent positions keep their channels; a constant index is applied to the tags."""
    tags: Tensor = operation.first
    places: Any = operation.node.args[1]
    known = [place if place is None else operation.constants.get(place) for place in places]
    picked = [axis for axis, place in enumerate(places) if place is not None]
    if all(known[axis] is not None for axis in picked):
        return operation.run(tags, known)
    if picked != list(range(len(picked))):
        raise ValueError("axes between others")
    return _any_along(tags.flatten(0, len(picked) - 1), 0)[0].expand(operation.output.shape)


def _any_along(tags: Tensor, dim: int) -> Tensor:
    """The tags at one data-dependent position along `dim`: all positions must have the same channels."""
    place = tags.narrow(dim, 0, 1)
    if not torch.equal(tags, place.expand(tags.shape)):
        raise ValueError("different channels at different places")
    return place


def _choose(operation: Operation) -> Any:
    """Data-dependent selection of channels, so none can be removed by its index alone."""
    count = operation.named.get("k")
    if isinstance(count, int):
        _note_choice(operation, count, operation.first.movedim(operation.named["dim"], -1))
    operation.space.stops.append((operation.first, f"{operation.where} chooses among its channels"))
    return untagged(operation.output)


def _note_choice(operation: Operation, count: int, channels: Tensor) -> None:
    """channels: (..., channels), of which `count` are selected."""
    rows = torch.unique(channels.flatten(0, -2), dim=0)
    operation.space.choices.append(Choice(count, operation.module, rows))


def _scatter(operation: Operation) -> Any:
    """Numbers at data-dependent places leave the other channels as they are."""
    if isinstance(operation.named.get("src"), Tensor):
        raise ValueError("values with channels of their own")
    return operation.first


def _product_with_parameter(operation: Operation) -> Any:
    """Tie the input's channels to the contracted axis of the parameter; its other axis produces the output."""
    added = operation.name == "addmm"
    inputs, parameter = operation.arguments[-2:] if added else operation.arguments[:2]
    bias, axes = operation.named.get("self" if added else "bias"), list(parameter.axes)
    *stack, contracted, produced = axes[::-1] if operation.name == "linear" else axes
    if isinstance(inputs, ParameterTags) or len(stack) != ("grouped" in operation.name or operation.name == "bmm"):
        raise ValueError("no product of an activation and matrices")
    for axis in stack:  # matrices of experts: each token uses that of its expert
        operation.space.mark("stacked", axis)
    operation.space.tie(inputs, contracted.expand(inputs.shape))
    operation.space.mark("consumed", contracted)
    operation.space.mark("produced", produced)
    if isinstance(bias, Tensor):
        operation.space.tie(produced, bias)
    return produced.expand(operation.output.shape)


def _embedding(operation: Operation) -> Any:
    channels = operation.named["weight"].axes[1]
    operation.space.mark("produced", channels)
    return channels.expand(operation.output.shape)


def _permute_parameter(operation: Operation) -> ParameterTags:
    axes = operation.first.axes
    numbered = torch.empty(tuple(range(len(axes))), device="meta")  # the size of each axis is its number
    moved = operation.run(numbered, *operation.arguments[1:], **operation.keywords)
    return ParameterTags(tuple(axes[number] for number in moved.shape))


def _split_parameter(operation: Operation) -> Any:
    """slice, select, split, chunk: the operation runs on the tags of the axis that it acts on."""
    axes = operation.first.axes
    dim = operation.named["dim"] % len(axes)
    before, after = axes[:dim], axes[dim + 1 :]
    keywords = {name: value for name, value in operation.named.items() if name not in ("self", "dim")}
    moved = operation.run(axes[dim], **keywords, dim=0)
    if operation.name == "select":
        rest = before + after
        return rest[0] if len(rest) == 1 else ParameterTags(rest)
    pieces = [ParameterTags((*before, piece, *after)) for piece in tree_leaves(moved)]
    return pieces[0] if isinstance(moved, Tensor) else pieces


def _squeeze_parameter(operation: Operation) -> Any:
    """The parameter without its axes of size 1: all of them, as the operation's `dim` is not supported."""
    if "dim" in operation.named:
        raise ValueError("single axes")
    axes = tuple(tags for tags in operation.first.axes if len(tags) > 1)
    return axes[0] if len(axes) == 1 else ParameterTags(axes)


def _rows_of_parameter(operation: Operation) -> Tensor:
    """Rows at data-dependent places: a table of positions, or the biases of experts, one row for each."""
    axes = operation.first.axes
    operation.space.mark("looked up", axes[0])
    tags: Tensor = axes[-1].expand(operation.output.shape)
    return tags


def _by_name(*rules: tuple[str, Rule]) -> dict[str, Rule]:
    return {name: rule for names, rule in rules for name in names.split()}


RULES = _by_name(
    (
        "alias clone contiguous detach dropout float lift_fresh_copy masked_fill _to_copy to tril triu type_as",
        lambda op: op.first,
    ),
    # They use only shape and type of their argument.
    ("empty_like full_like new_empty new_full new_ones new_zeros ones_like zeros_like", lambda op: untagged(op.output)),
    (_MOVES, _move),
    (_VIEWS, lambda op: op.first.reshape(op.output.shape)),
    ("view_as_complex", _view_as_complex),
    ("view_as_real", lambda op: op.first.unsqueeze(-1).expand(op.output.shape)),
    ("pad constant_pad_nd", lambda op: torch.nn.functional.pad(op.first, op.named["pad"], value=UNTAGGED)),
    ("absolute copy divide floor_divide hardswish log_sigmoid multiply negative special_expit subtract", _elementwise),
    ("amax amin any linalg_vector_norm logsumexp max mean min norm std sum var var_mean", _reduce),
    ("softmax _softmax log_softmax cumsum cumprod", _mix),
    ("layer_norm rms_norm", _norm),
    ("matmul bmm mm baddbmm", _matmul),
    ("scaled_dot_product_attention", _attention),
    ("einsum", _einsum),
    ("index", _index),
    ("gather", lambda op: _any_along(op.first, op.named["dim"]).expand(op.output.shape)),
    ("topk", _choose),
    ("scatter", _scatter),
)
PARAMETER_RULES = _by_name(
    ("alias clone contiguous detach to _to_copy", lambda op: op.first),
    ("t mT numpy_T transpose permute", _permute_parameter),
    ("slice select split split_with_sizes chunk narrow", _split_parameter),
    ("squeeze", _squeeze_parameter),
    ("linear addmm mm matmul bmm grouped_mm _grouped_mm grouped_mm_fallback", _product_with_parameter),
    ("getitem", _move),
    ("embedding", _embedding),
    ("index", _rows_of_parameter),
)
