"""What each kind of operation does to channel tags.

Movement of data is carried out on the tags themselves, element-wise operations tie what they combine, contractions
tie what they sum over, reductions are noted. An operation without a rule stops the channels that go into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saap.discovery.tags import UNTAGGED, Choice, ParameterTags, Reduction, TagSpace, finest

Rule = Callable[["Step"], Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One operation with tags in place of tensors.

    in_place: whether it changes its first argument. positional, keywords: as in the graph. named: all arguments by
    their names in the operation's schema. output: the result as the graph knows it (meta tensors). module: path of the
    module that it belongs to. square: whether the first argument is a square. constant: gives the value of an argument
    that does not depend on the input, else None.
    """

    space: TagSpace
    name: str
    target: Any
    in_place: bool
    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    named: dict[str, Any]
    output: Any
    module: str
    square: bool
    constant: Callable[[str], Any]

    def values(self) -> Iterator[Tensor | ParameterTags]:
        """All tensors among the arguments."""
        for value in (*self.positional, *self.keywords.values()):
            yield from (item for item in flat(value) if isinstance(item, (Tensor, ParameterTags)))

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, parameters as activations."""
        return [value.as_activation() if isinstance(value, ParameterTags) else value for value in self.values()]


def untagged(output: Any) -> Any:
    """Empty tags in the structure of `output`."""
    if isinstance(output, Tensor):
        return torch.full(tuple(output.shape), UNTAGGED)
    return [untagged(item) for item in output] if isinstance(output, (list, tuple)) else None


def flat(value: Any) -> Iterator[Any]:
    """What lies in nested lists, one by one."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from flat(item)
    else:
        yield value


def _same(step: Step) -> Any:
    return step.positional[0]


def _made_anew(step: Step) -> Any:
    """A tensor that has no more than shape and type of the one that it is made from."""
    return untagged(step.output)


def _move(step: Step) -> Any:
    return step.target(*step.positional, **step.keywords)


def _view(step: Step) -> Tensor:
    tags: Tensor = step.positional[0]
    return tags.reshape(tuple(step.output.shape))


def _view_as_complex(step: Step) -> Tensor:
    """Real and imaginary part are channels that leave together."""
    tags: Tensor = step.positional[0]
    step.space.tie_along(tags, -1)
    return tags.select(-1, 0)


def _view_as_real(step: Step) -> Tensor:
    tags: Tensor = step.positional[0]
    return tags.unsqueeze(-1).expand(tuple(step.output.shape))


def _pad(step: Step) -> Tensor:
    return torch.nn.functional.pad(step.positional[0], step.named["pad"], value=UNTAGGED)


def elementwise(step: Step) -> Tensor:
    """What meets at one element leaves together."""
    shape = tuple(step.output.shape)
    tagged = [tags for tags in step.tensors() if bool((tags >= 0).any())]
    if len(tagged) > 1:
        tagged = finest(tagged)
    result = tagged[0].expand(shape)
    for tags in tagged[1:]:
        step.space.tie_shared(tags.expand(shape), result)
        result = torch.where(result < 0, tags, result)
    return result


def _mix(step: Step) -> Tensor:
    """Softmax, cumulative sums: every channel along the axis has a part in all others."""
    tags: Tensor = step.positional[0]
    step.space.tie_along(tags, step.named["dim"])
    if "softmax" in step.name:
        step.space.mark("softmax", tags)
    return tags


def _reduce(step: Step) -> Any:
    """A statistic over some axes; it stays with a unit that it does not leave. max and min of two tensors are none."""
    if "other" in step.named:
        return elementwise(step)
    tags: Tensor = step.positional[0]
    dims = step.named.get("dim")
    chosen = range(tags.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    axes = sorted(axis % tags.ndim for axis in chosen)
    keep = bool(step.named.get("keepdim"))
    low, high = tags.amin(axes, keepdim=keep), tags.amax(axes, keepdim=keep)
    if isinstance(step.output, Tensor) and torch.equal(low, high):
        return low
    others = [axis for axis in range(tags.ndim) if axis not in axes]
    channels = tags.permute(*others, *axes).flatten(len(others)).flatten(0, -2) if others else tags.reshape(1, -1)
    kind = "rms" if step.name == "mean" and step.square else step.name
    _note_reduction(step, kind, channels)
    return untagged(step.output)


def _note_reduction(step: Step, kind: str, channels: Tensor) -> None:
    step.space.reductions.append(Reduction(kind, step.module, torch.unique(channels, dim=0)))


def _norm(step: Step) -> Tensor:
    tags: Tensor = step.positional[0]
    axes = len(step.named["normalized_shape"])
    _note_reduction(step, "rms" if step.name == "rms_norm" else step.name, tags.flatten(-axes).flatten(0, -2))
    for name in ("weight", "bias"):
        parameter = step.named.get(name)
        if isinstance(parameter, Tensor):
            step.space.tie_shared(parameter.expand(tags.shape), tags)
            tags = torch.where(tags < 0, parameter.expand(tags.shape), tags)
    return tags


def _matmul(step: Step) -> Tensor:
    first, second = step.positional[:2]
    if first.ndim < 2 or second.ndim < 2:
        raise ValueError("a vector")
    return step.space.contract(first, second)


def _baddbmm(step: Step) -> Tensor:
    added, first, second = step.positional[:3]
    product = step.space.contract(first, second)
    step.space.tie_shared(added.expand(product.shape), product)
    return product


def _attention(step: Step) -> Tensor:
    query, key, value = (step.named[name] for name in ("query", "key", "value"))
    repeats = query.shape[-3] // key.shape[-3]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = step.space.contract(query, key.transpose(-1, -2))
    step.space.mark("softmax", scores)
    return step.space.contract(scores, value)


def _einsum(step: Step) -> Tensor:
    """Two activations: brought to the form of a batched product and back."""
    equation, (first, second) = step.positional[0].replace(" ", ""), step.positional[1]
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    batch = [axis for axis in left if axis in right and axis in result]
    summed = [axis for axis in left if axis in right and axis not in result]
    rows = [axis for axis in left if axis not in right]
    columns = [axis for axis in right if axis not in left]
    size = dict(zip(left + right, (*first.shape, *second.shape), strict=True))
    if not summed or "." in equation or set(rows + columns) - set(result):
        raise ValueError(equation)

    def arranged(tags: Tensor, axes: str, *parts: list[str]) -> Tensor:
        order = [axes.index(axis) for part in parts for axis in part]
        lengths = [torch.Size(size[axis] for axis in part).numel() for part in parts]
        return tags.permute(order).reshape(lengths)

    product = step.space.contract(
        arranged(first, left, batch, rows, summed), arranged(second, right, batch, summed, columns)
    )
    axes = batch + rows + columns
    return product.reshape([size[axis] for axis in axes]).permute([axes.index(axis) for axis in result])


def _index(step: Step) -> Tensor:
    """Positions picked by data keep their channels; a constant index is carried out."""
    tags: Tensor = step.positional[0]
    places = step.positional[1]
    known = step.constant("indices")
    if known is not None:
        picked_tags: Tensor = step.target(tags, known)
        return picked_tags
    picked = [axis for axis, place in enumerate(places) if place is not None]
    if picked != list(range(len(picked))):
        raise ValueError("axes between others")
    rest = tags.flatten(0, len(picked) - 1)
    if not torch.equal(rest, rest[:1].expand(rest.shape)):
        raise ValueError("different channels at different places")
    return rest[0].expand(tuple(step.output.shape))


def _choose(step: Step) -> Any:
    """Which channels go on depends on the data, so none of them can be taken out by its place alone."""
    count = step.named.get("k")
    if isinstance(count, int):
        step.space.choices.append(Choice(count, _seen_along(step.positional[0], step.named["dim"])))
    step.space.stop(step.positional[0], f"{step.name} in {step.module or 'the model'} chooses among its channels")
    return untagged(step.output)


def _seen_along(tags: Tensor, dim: int) -> Tensor:
    """Tags along an axis, where they are the same at all other places."""
    rows: Tensor = torch.unique(tags.movedim(dim, -1).flatten(0, -2), dim=0)
    first: Tensor = rows[0]
    return first if len(rows) == 1 else first[:0]


def _gather(step: Step) -> Tensor:
    tags: Tensor = step.positional[0]
    dim: int = step.named["dim"]
    first: Tensor = tags.narrow(dim, 0, 1)
    if not torch.equal(tags, first.expand(tags.shape)):
        raise ValueError("different channels at different places")
    return first.expand(tuple(step.output.shape))


def _linear_to(step: Step, inputs: Tensor, contracted: Tensor, produced: Tensor, bias: Any) -> Tensor:
    if isinstance(inputs, ParameterTags):
        raise ValueError("a product of parameters")
    step.space.tie(inputs, contracted.expand(inputs.shape))
    step.space.mark("consumed", contracted)
    step.space.mark("produced", produced)
    if isinstance(bias, Tensor):
        step.space.tie(produced, bias)
    return produced.expand(tuple(step.output.shape))


def _linear(step: Step) -> Tensor:
    produced, contracted = step.named["weight"].axes
    return _linear_to(step, step.named["input"], contracted, produced, step.named.get("bias"))


def _addmm(step: Step) -> Tensor:
    contracted, produced = step.named["mat2"].axes
    return _linear_to(step, step.named["mat1"], contracted, produced, step.named["self"])


def _parameter_matmul(step: Step) -> Tensor:
    contracted, produced = step.positional[1].axes
    return _linear_to(step, step.positional[0], contracted, produced, None)


def _grouped_product(step: Step) -> Tensor:
    """Each token times the matrix of its expert; the matrices are stacked along the first axis."""
    stack, contracted, produced = step.positional[1].axes
    step.space.mark("stacked", stack)
    return _linear_to(step, step.positional[0], contracted, produced, None)


def _embedding(step: Step) -> Tensor:
    channels: Tensor = step.named["weight"].axes[1]
    step.space.mark("embedded", channels)
    return channels.expand(tuple(step.output.shape))


def _permute_parameter(step: Step) -> ParameterTags:
    axes = step.positional[0].axes
    if step.name == "permute":
        return ParameterTags(tuple(axes[dim] for dim in step.named["dims"]))
    first, second = (step.named["dim0"], step.named["dim1"]) if step.name == "transpose" else (-1, -2)
    order = list(range(len(axes)))
    order[first], order[second] = order[second], order[first]
    return ParameterTags(tuple(axes[dim] for dim in order))


def _split_parameter(step: Step) -> Any:
    """slice, select, split, chunk: the operation runs on the tags of the axis that it acts on."""
    axes = list(step.positional[0].axes)
    dim = step.named["dim"] % len(axes)
    keywords = {name: value for name, value in step.named.items() if name not in ("self", "dim")}
    moved = step.target(axes[dim], **keywords, dim=0)
    if step.name == "select":
        rest = axes[:dim] + axes[dim + 1 :]
        return rest[0] if len(rest) == 1 else ParameterTags(tuple(rest))
    pieces = [ParameterTags((*axes[:dim], piece, *axes[dim + 1 :])) for piece in flat(moved)]
    return pieces[0] if isinstance(moved, Tensor) else pieces


def _parameter_position(step: Step) -> Tensor:
    """A table of positions, indexed by data: its last axis holds the channels."""
    if not isinstance(step.positional[0], ParameterTags) or step.output.shape[-1] != step.positional[0].shape[-1]:
        raise ValueError("not a table")
    return step.positional[0].axes[-1].expand(tuple(step.output.shape))


_SAME = (
    "alias", "clone", "contiguous", "detach", "dropout", "float", "lift_fresh_copy", "masked_fill", "_to_copy", "to",
    "tril", "triu", "type_as",
)  # fmt: skip
_MADE_ANEW = (
    "empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like",
)  # fmt: skip
_MOVE = (
    "broadcast_to", "cat", "chunk", "diagonal", "expand", "expand_as", "flatten", "flip", "index_select", "movedim",
    "mT", "narrow", "numpy_T", "permute", "repeat", "repeat_interleave", "roll", "select", "slice", "split",
    "split_with_sizes", "squeeze", "stack", "swapaxes", "swapdims", "t", "tensor_split", "transpose", "unbind",
    "unflatten", "unfold", "unsqueeze",
)  # fmt: skip
_ELEMENTWISE = (
    "absolute", "copy", "divide", "floor_divide", "hardswish", "log_sigmoid", "multiply", "negative", "special_expit",
    "subtract",
)  # fmt: skip
_REDUCE = (
    "amax", "amin", "any", "linalg_vector_norm", "logsumexp", "max", "mean", "min", "norm", "std", "sum", "var",
    "var_mean",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_MADE_ANEW, _made_anew),
    **dict.fromkeys(_MOVE, _move),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(("view", "reshape", "reshape_as", "_unsafe_view", "view_as"), _view),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "cumsum", "cumprod"), _mix),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    "baddbmm": _baddbmm,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    "index": _index,
    "gather": _gather,
    "topk": _choose,
    "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real,
}
PARAMETER_RULES: dict[str, Rule] = {
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "to", "_to_copy"), _same),
    **dict.fromkeys(("t", "mT", "numpy_T", "transpose", "permute"), _permute_parameter),
    **dict.fromkeys(("slice", "select", "split", "split_with_sizes", "chunk", "narrow"), _split_parameter),
    **dict.fromkeys(("mm", "matmul"), _parameter_matmul),
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped_product),
    "linear": _linear,
    "addmm": _addmm,
    "embedding": _embedding,
    "index": _parameter_position,
}
# What is made without channels may be filled through a view of it: those share memory as they do in the model.
SHARING_MEMORY: tuple[Rule, ...] = (_move, _view)
