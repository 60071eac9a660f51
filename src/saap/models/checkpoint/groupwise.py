"""Weights as small integers with a scale and a zero point for each group of inputs: the layer, and the file.

A weight W (out x in) is split along its inputs into groups of L. Group g of output o holds the codes q of b bits, and
W = s * q + z with one scale s and one zero point z each. Codes stay packed: no full-precision copy of a whole matrix is
made, neither forward nor backward.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.errors import ModelError
from saap.models.checkpoint.safetensor_files import TensorEntry, open_safetensors, write_tensors
from saap.models.structure.linear import contracted_axis, linear_modules, weight_out_in

PACKED_FILE = "packed.safetensors"
"""In the folder `saap` of a checkpoint, where no loader of plain weights looks."""
Q4_1_GROUP = 32
_PARTS = ("packed", "scale", "zero")
# Values of the matrix that exist in full precision at once: few enough to stay in a processor's cache; elsewhere few
# enough not to matter beside the activations.
VALUES_AT_ONCE, VALUES_ON_ACCELERATORS = 2**18, 2**24
# Codes are stored as planes of these bits, so that each plane has a whole number of codes in a byte.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupwiseWeight:
    """A matrix (out, in) with in = groups * group_size.

    packed: (out, groups, group_size * bits / 8) uint8, see `pack`. scale: (out, groups) float16 (wider while it is
    learned). zero: (out, groups) float32, in units of the weight.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.packed.shape[0], self.packed.shape[1] * self.group_size

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return int(self.packed.nbytes + self.scale.nbytes + self.zero.nbytes)

    def codes(self) -> Tensor:
        """The integers, (out, in) uint8."""
        return unpack(self.packed, self.bits, self.group_size).flatten(1)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole matrix (out, in), computed in at least float32."""
        matrix = torch.empty(self.shape, dtype=dtype, device=self.packed.device)
        for rows, values in _row_chunks(self.packed, self.scale, self.zero, self.bits, self.group_size, dtype):
            matrix[rows] = values
        return matrix


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (out, groups, L) of `bits` bits as bytes, (out, groups, L * bits / 8) uint8.

    A byte of a plane of k bits holds 8 / k codes that lie L k / 8 apart, the first in its lowest bits. Three bits are a
    plane of the two lower bits followed by one of the highest. With four bits and L = 32 these are the bytes of GGUF's
    Q4_1.
    """
    planes = []
    shift = 0
    for plane in _PLANES[bits]:
        part = (codes.to(torch.uint8) >> shift) & (2**plane - 1)
        parts = part.chunk(8 // plane, dim=-1)
        planes.append(reduce(torch.bitwise_or, (one << (plane * index) for index, one in enumerate(parts))))
        shift += plane
    return torch.cat(planes, dim=-1)


def unpack(packed: Tensor, bits: int, group_size: int) -> Tensor:
    """The codes (out, groups, L) uint8 that `pack` was given."""
    codes = torch.zeros(*packed.shape[:-1], group_size, dtype=torch.uint8, device=packed.device)
    start = shift = 0
    for plane in _PLANES[bits]:
        size = group_size * plane // 8
        for index, part in enumerate(_codes_of_plane(packed[..., start : start + size], plane)):
            codes[..., index * size : (index + 1) * size] |= part << shift
        start += size
        shift += plane
    return codes


def _codes_of_plane(packed: Tensor, plane: int) -> Iterator[Tensor]:
    last = 8 // plane - 1
    for index in range(last + 1):
        shifted = packed >> (plane * index) if index else packed
        yield shifted if index == last else shifted & (2**plane - 1)


def _row_chunks(
    packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """The matrix a few rows at a time: (rows, values (rows, in) of `dtype`), computed in at least float32.

    The storage is used again each time.
    """
    outputs, groups = scale.shape
    full = torch.promote_types(dtype, torch.float32)
    at_once = VALUES_AT_ONCE if packed.device.type == "cpu" else VALUES_ON_ACCELERATORS
    step = max(1, at_once // max(1, groups * group_size))
    buffer = torch.empty(min(step, outputs), groups, group_size, dtype=full, device=packed.device)
    for start in range(0, outputs, step):
        rows = slice(start, min(start + step, outputs))
        values = buffer[: rows.stop - start]
        factor = scale[rows].to(full).unsqueeze(-1)
        if len(_PLANES[bits]) == 1:
            size = packed.shape[-1]
            for index, part in enumerate(_codes_of_plane(packed[rows], _PLANES[bits][0])):
                torch.mul(part, factor, out=values[..., index * size : (index + 1) * size])
        else:
            torch.mul(unpack(packed[rows], bits, group_size), factor, out=values)
        values += zero[rows].to(full).unsqueeze(-1)
        yield rows, values.flatten(1).to(dtype)


class _GroupwiseProduct(torch.autograd.Function):
    """x -> x W^T and its gradients by x, by the scales and by the zero points, with W a few rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int
    ) -> Tensor:
        _, _, by_scale, by_zero, *_ = ctx.needs_input_grad
        # the zero points need of the inputs no more than their sums
        kept = inputs if by_scale else pooled(inputs, group_size) if by_zero else None
        ctx.save_for_backward(packed, scale, zero, kept)
        ctx.layout = bits, group_size
        flat = inputs.reshape(-1, inputs.shape[-1])
        outputs = flat.new_empty(len(flat), len(scale))
        for rows, values in _row_chunks(packed, scale, zero, bits, group_size, inputs.dtype):
            outputs[:, rows] = flat @ values.T
        return outputs.reshape(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        packed, scale, zero, kept = ctx.saved_tensors  # read once: checkpointing recomputes them
        bits, group_size = ctx.layout
        _, _, needs_scale, needs_zero, *_ = ctx.needs_input_grad
        flat = gradients[0].reshape(-1, gradients[0].shape[-1])
        kept = flat if kept is None else kept.reshape(len(flat), -1)
        by_inputs = flat.new_zeros(len(flat), scale.shape[1] * group_size)
        by_scale = torch.empty_like(scale) if needs_scale else None
        by_zero = torch.empty_like(zero) if needs_scale else None
        for rows, values in _row_chunks(packed, scale, zero, bits, group_size, flat.dtype):
            by_inputs.addmm_(flat[:, rows], values)
            if by_scale is not None and by_zero is not None:
                by_weight = (flat[:, rows].T @ kept).to(scale.dtype).reshape(-1, scale.shape[1], group_size)
                by_zero[rows] = by_weight.sum(-1)
                by_scale[rows] = _scale_gradient(by_weight, values, scale[rows], zero[rows], by_zero[rows])
        if needs_zero and by_zero is None:
            by_zero = (flat.T.to(kept.dtype) @ kept).to(zero.dtype)
        by_inputs = by_inputs.reshape(*gradients[0].shape[:-1], -1)
        return by_inputs, None, by_scale, by_zero if needs_zero else None, None, None


def _scale_gradient(by_weight: Tensor, values: Tensor, scale: Tensor, zero: Tensor, by_zero: Tensor) -> Tensor:
    """Sum of dL/dW q over each group, with q = (W - z) / s: (rows, groups); 0 where the scale is 0.

    by_weight: dL/dW, (rows, groups, L), is overwritten. values: W, (rows, in). by_zero: sum of dL/dW over each group.
    """
    summed = by_weight.mul_(values.view_as(by_weight)).sum(-1) - zero * by_zero
    return (summed / scale).where(scale != 0, 0.0)


def groupwise_product(inputs: Tensor, weight: GroupwiseWeight) -> Tensor:
    """Product of the inputs (..., in) and the transposed weight: (..., out).

    Differentiable in the inputs and in the weight's scales and zero points.
    """
    product: Any = _GroupwiseProduct.apply
    result: Tensor = product(inputs, weight.packed, weight.scale, weight.zero, weight.bits, weight.group_size)
    return result


def pooled(inputs: Tensor, group_size: int) -> Tensor:
    """Sum of the inputs (..., in) over each group: (..., groups), in at least float32."""
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    return inputs.reshape(*inputs.shape[:-1], -1, group_size).sum(-1, dtype=dtype)


class GroupwiseLinear(nn.Module):
    """Stands where a linear layer was; its weight is held as packed codes.

    bias: of the layer it replaces, None without one. transposed: that layer stores its weight as (in, out).
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: GroupwiseWeight, bias: nn.Parameter | None = None, *, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.out_features, self.in_features = weight.shape
        self.bits, self.group_size = weight.bits, weight.group_size
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_parameter("bias", bias)

    @property
    def quantised(self) -> GroupwiseWeight:
        """The weight in its packed form; shares the storage."""
        return GroupwiseWeight(
            packed=self.packed, scale=self.scale, zero=self.zero, bits=self.bits, group_size=self.group_size
        )

    def stored_weight(self, dtype: torch.dtype) -> Tensor:
        """The full weight as the replaced layer stores it."""
        full = self.quantised.dequantised(dtype)
        return full.T if self.transposed else full

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (..., in). Returns (..., out)."""
        outputs = groupwise_product(inputs, self.quantised)
        return outputs if self.bias is None else outputs + self.bias

    def extra_repr(self) -> str:
        """What is shown when the model is printed."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"

    def _apply(self, fn: Any, recurse: bool = True) -> GroupwiseLinear:
        # model.to(dtype) is about the type to compute in: it must not round the scales and zero points.
        scale, zero = self.scale, self.zero
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = scale.to(self.packed.device)
        self.zero = zero.to(self.packed.device)
        return self


def linears_inside(model: nn.Module, blocks: Sequence[str]) -> dict[str, int]:
    """Path and input size of every linear layer inside the decoder blocks at these paths."""
    inside = tuple(f"{block}." for block in blocks)
    return {
        path: weight_out_in(module).shape[1]
        for path, module in linear_modules(model).items()
        if path.startswith(inside)
    }


WeightOf = Callable[[str, Callable[[], Tensor]], GroupwiseWeight]
"""Gives the packed weight of the layer at a path; its second argument reads the stored one, (out, in)."""


def pack_linear(model: nn.Module, path: str, weight: GroupwiseWeight, device: torch.device) -> None:
    """Replace the linear layer at a path by one of packed weights, in place."""
    module = model.get_submodule(path)
    packed = GroupwiseLinear(weight, module._parameters.get("bias"), transposed=contracted_axis(module) == 0)
    model.set_submodule(path, packed.to(device))


@torch.no_grad()
def pack_linears(
    model: nn.Module,
    paths: Collection[str],
    weight_of: WeightOf,
    device: torch.device,
    stored: Callable[[str], Tensor] | None = None,
) -> None:
    """Replace the linear layers at these paths one by one, in place.

    stored: gives the weight of a layer, (out, in); None for a model whose weights are in memory.
    """
    read = stored or (lambda path: weight_out_in(model.get_submodule(path)))
    for path in paths:
        pack_linear(model, path, weight_of(path, partial(read, path)), device)


def write_packed(path: Path, weights: Mapping[str, GroupwiseWeight]) -> None:
    """Write packed weights by module path, tensor by tensor: `PATH.packed`, `PATH.scale` and `PATH.zero`."""
    parts = {f"{name}.{part}": getattr(weight, part) for name, weight in weights.items() for part in _PARTS}
    formats = {name: [weight.bits, weight.group_size] for name, weight in weights.items()}
    entries = {name: TensorEntry.of(tensor) for name, tensor in parts.items()}
    write_tensors(path, entries, {"format": "pt", "groupwise": json.dumps(formats)})


def read_packed(folder: str | Path) -> dict[str, GroupwiseWeight]:
    """The packed weights of a checkpoint folder by module path. Raises ModelError if it has none, or not whole."""
    path = Path(folder) / "saap" / PACKED_FILE
    if not path.is_file():
        raise ModelError(f"{folder} has no packed weights", "Give a folder that `saap recover` has written")
    with _packed_file(path) as (file, formats):
        return {
            name: GroupwiseWeight(
                **{part: file.get_tensor(f"{name}.{part}") for part in _PARTS}, bits=bits, group_size=size
            )
            for name, (bits, size) in formats.items()
        }


@contextmanager
def _packed_file(path: Path) -> Iterator[tuple[Any, dict[str, tuple[int, int]]]]:
    """A file of packed weights, open, with the bits and group size of each by name. Raises ModelError if damaged."""
    with open_safetensors(path) as file:
        try:
            formats = json.loads(file.metadata()["groupwise"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path} is damaged ({error})", "Copy the file again") from None
        yield file, formats


def q4_1_blocks(weight: GroupwiseWeight) -> Tensor:
    """The weight as GGUF blocks of type Q4_1, (out, in / 32 * 20) uint8.

    A block of 32 weights is its scale and its minimum in float16 and 16 bytes of codes. The codes and scales are the
    very same; the minimum is the zero point rounded to float16. Raises ModelError for other bits or group sizes.
    """
    if weight.bits != 4 or weight.group_size != Q4_1_GROUP:
        raise ModelError(
            f"A weight of {weight.bits} bits in groups of {weight.group_size} is no Q4_1",
            f"Recover with --bits 4 --group-size {Q4_1_GROUP}",
        )
    numbers = torch.stack([weight.scale, weight.zero.half()], dim=-1).contiguous().view(torch.uint8)
    return torch.cat([numbers, weight.packed], dim=-1).flatten(1)


class PackedMatrices:
    """The packed weights of a checkpoint folder that are Q4_1 already, read a few rows at a time.

    names: of the weights, as in a plain checkpoint. refused: why none of them is, where the folder has packed weights
    of other bits or group sizes; None otherwise. Raises ModelError for a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "saap" / PACKED_FILE
        self.names: set[str] = set()
        self.refused: str | None = None
        if not self._path.is_file():
            return
        with _packed_file(self._path) as (_, formats):
            for path, (bits, size) in formats.items():
                if (bits, size) == (4, Q4_1_GROUP):
                    self.names.add(f"{path}.weight")
                else:
                    self.refused = f"{PACKED_FILE} has {bits} bits in groups of {size}"

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first..last-1 of a weight as blocks, see `q4_1_blocks`."""
        path = name.removesuffix(".weight")
        with open_safetensors(self._path) as file:
            parts = {part: file.get_slice(f"{path}.{part}")[first:last] for part in _PARTS}
        return q4_1_blocks(GroupwiseWeight(**parts, bits=4, group_size=Q4_1_GROUP))
