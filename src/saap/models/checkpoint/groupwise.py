"""Group-wise quantised weights (integers with a scale and a zero point per group of inputs): layer and file.

A weight W (out x in) is split along its inputs into groups of L. Each output and group has codes q of b bits, one scale
s and one zero point z: W = s * q + z. Codes stay packed: neither forward nor backward creates a full-precision copy of
a whole matrix.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.errors import ModelError
from saap.models.checkpoint.safetensor_files import TensorEntry, open_safetensors, write_tensors
from saap.models.loading.devices import multiplied_in
from saap.models.structure.linear import contracted_axis, linear_modules, only_multiplies, weight_out_in
from saap.models.structure.routers import routers_inside

PACKED_FILE = "packed.safetensors"
"""File in the folder `saap` of a checkpoint, which loaders of plain weights ignore."""
Q4_1_GROUP = 32
_PARTS = ("packed", "scale", "zero")
# Matrix values in full precision at once: on a CPU few enough for its cache, elsewhere few compared with the
# activations.
VALUES_AT_ONCE, VALUES_ON_ACCELERATORS = 2**18, 2**24
# Codes are stored as bit planes (lowest bit, number of bits), so a byte has a whole number of codes.
_PLANES = {2: ((0, 2),), 3: ((0, 2), (2, 1)), 4: ((0, 4),), 8: ((0, 8),)}


@dataclass(frozen=True, slots=True, eq=False)
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
        for rows, values in _row_chunks(self, dtype):
            matrix[rows] = values
        return matrix


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (out, groups, L) of `bits` bits as bytes, (out, groups, L * bits / 8) uint8.

    A byte of a plane of k bits has 8 / k codes that lie L k / 8 apart, the first in its lowest bits. Three bits are a
    plane of the two lower bits followed by one of the highest. With four bits and L = 32 these are the bytes of GGUF's
    Q4_1.
    """
    planes = []
    for lowest, width in _PLANES[bits]:
        parts = ((codes.to(torch.uint8) >> lowest) & (2**width - 1)).chunk(8 // width, dim=-1)
        planes.append(reduce(or_, (part << (width * index) for index, part in enumerate(parts))))
    return torch.cat(planes, dim=-1)


def unpack(packed: Tensor, bits: int, group_size: int) -> Tensor:
    """The codes (out, groups, L) uint8, the inverse of `pack`."""
    planes = torch.split(packed, [group_size * width // 8 for _, width in _PLANES[bits]], dim=-1)
    found = zip(planes, _PLANES[bits], strict=True)
    return reduce(or_, (torch.cat(_codes_of(plane, width), dim=-1) << lowest for plane, (lowest, width) in found))


def _codes_of(plane: Tensor, width: int) -> list[Tensor]:
    shifted = [plane >> (width * index) if index else plane for index in range(8 // width)]
    return [*(part & (2**width - 1) for part in shifted[:-1]), shifted[-1]]


def _row_chunks(weight: GroupwiseWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The matrix a few rows at a time: (rows, values (rows, in) of `dtype`), computed in at least float32.

    The storage is reused in each iteration.
    """
    outputs, groups = weight.scale.shape
    full = torch.promote_types(dtype, torch.float32)
    at_once = VALUES_AT_ONCE if weight.packed.device.type == "cpu" else VALUES_ON_ACCELERATORS
    step = max(1, at_once // max(1, groups * weight.group_size))
    buffer = torch.empty(min(step, outputs), groups, weight.group_size, dtype=full, device=weight.packed.device)
    (_, width), *more = _PLANES[weight.bits]
    for start in range(0, outputs, step):
        rows = slice(start, min(start + step, outputs))
        values, packed = buffer[: rows.stop - start], weight.packed[rows]
        factor = weight.scale[rows].to(full).unsqueeze(-1)
        parts = [unpack(packed, weight.bits, weight.group_size)] if more else _codes_of(packed, width)
        for place, part in zip(values.chunk(len(parts), dim=-1), parts, strict=True):
            torch.mul(part, factor, out=place)
        values += weight.zero[rows].to(full).unsqueeze(-1)
        yield rows, values.flatten(1).to(dtype)


class _GroupwiseProduct(torch.autograd.Function):
    """x W^T and its gradients for x, scales and zero points, with W a few rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int
    ) -> Tensor:
        _, _, by_scale, by_zero, *_ = ctx.needs_input_grad
        # the zero points need only the group sums of the inputs
        kept = inputs if by_scale else pooled(inputs, group_size) if by_zero else None
        ctx.save_for_backward(packed, scale, zero, kept)
        ctx.layout = bits, group_size
        kind = inputs.device.type
        rounds = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        ctx.products = torch.get_autocast_dtype(kind) if rounds else None
        flat = inputs.reshape(-1, inputs.shape[-1])
        outputs = flat.new_empty(len(flat), len(scale))
        for rows, values in _row_chunks(GroupwiseWeight(packed, scale, zero, bits, group_size), inputs.dtype):
            outputs[:, rows] = flat @ values.T
        return outputs.reshape(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *parts, kept = ctx.saved_tensors  # read once: checkpointing recomputes them
        weight = GroupwiseWeight(*parts, *ctx.layout)
        scale, zero = weight.scale, weight.zero
        _, _, needs_scale, needs_zero, *_ = ctx.needs_input_grad
        flat = gradients[0].reshape(-1, gradients[0].shape[-1])
        kept = flat if kept is None else kept.reshape(len(flat), -1)
        by_inputs = flat.new_zeros(len(flat), weight.shape[1])
        by_scale, by_zero = torch.empty_like(scale), torch.empty_like(zero)
        with multiplied_in(ctx.products, flat.device):
            for rows, values in _row_chunks(weight, flat.dtype):
                by_inputs += flat[:, rows] @ values
                if needs_scale:
                    by_weight = (flat[:, rows].T @ kept).to(scale.dtype).reshape(len(values), -1, weight.group_size)
                    by_zero[rows] = by_weight.sum(-1)
                    # the sum of dL/dW q over each group, with q = (W - z) / s; 0 where the scale is 0
                    summed = by_weight.mul_(values.view_as(by_weight)).sum(-1) - zero[rows] * by_zero[rows]
                    by_scale[rows] = (summed / scale[rows]).where(scale[rows] != 0, 0.0)
            if needs_zero and not needs_scale:
                by_zero = (flat.T.to(kept.dtype) @ kept).to(zero.dtype)
        by_inputs = by_inputs.reshape(*gradients[0].shape[:-1], -1)
        return by_inputs, None, by_scale if needs_scale else None, by_zero if needs_zero else None, None, None


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
    """Replacement of a linear layer with packed codes as weight.

    bias: of the replaced layer, None without one. transposed: whether that layer stores its weight as (in, out).
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
        for part in _PARTS:
            self.register_buffer(part, getattr(weight, part))
        self.register_parameter("bias", bias)

    @property
    def quantised(self) -> GroupwiseWeight:
        """The weight in its packed form; shares the storage."""
        return GroupwiseWeight(self.packed, self.scale, self.zero, self.bits, self.group_size)

    @property
    def weight(self) -> Tensor:
        """The full matrix, computed at each access: for forwards that read it, such as Jamba's and fused kernels."""
        return self.stored_weight(self.zero.dtype)

    def stored_weight(self, dtype: torch.dtype) -> Tensor:
        """The full weight as the replaced layer stores it."""
        full = self.quantised.dequantised(dtype)
        return full.T if self.transposed else full

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (..., in). Returns (..., out)."""
        outputs = groupwise_product(inputs, self.quantised)
        return outputs if self.bias is None else outputs + self.bias

    def extra_repr(self) -> str:
        """Details for printing the model."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"

    def _apply(self, fn: Any, recurse: bool = True) -> GroupwiseLinear:
        # model.to(dtype) sets the compute type: it must not round the scales and zero points.
        scale, zero = self.scale, self.zero
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = scale.to(self.packed.device)
        self.zero = zero.to(self.packed.device)
        return self


def linears_inside(model: nn.Module, blocks: Sequence[str]) -> dict[str, int]:
    """Path and input size of every plain linear layer inside the decoder blocks at these paths, except routers."""
    inside = tuple(f"{block}." for block in blocks)
    routers = {name.rpartition(".")[0] for name in routers_inside(model, blocks)}
    return {
        path: weight_out_in(module).shape[1]
        for path, module in linear_modules(model).items()
        if path.startswith(inside) and path not in routers and only_multiplies(module)
    }


def pack_linear(model: nn.Module, path: str, weight: GroupwiseWeight, device: torch.device) -> None:
    """Replace the linear layer at a path by one of packed weights, in place."""
    module = model.get_submodule(path)
    packed = GroupwiseLinear(weight, module._parameters.get("bias"), transposed=contracted_axis(module) == 0)
    model.set_submodule(path, packed.to(device))


def write_packed(path: Path, weights: Mapping[str, GroupwiseWeight]) -> None:
    """Write packed weights by module path, tensor by tensor: `PATH.packed`, `PATH.scale` and `PATH.zero`."""
    parts = {f"{name}.{part}": getattr(weight, part) for name, weight in weights.items() for part in _PARTS}
    formats = {name: [weight.bits, weight.group_size] for name, weight in weights.items()}
    entries = {name: TensorEntry.of(tensor) for name, tensor in parts.items()}
    write_tensors(path, entries, {"format": "pt", "groupwise": json.dumps(formats)})


def read_packed(folder: str | Path) -> dict[str, GroupwiseWeight]:
    """The packed weights of a checkpoint folder by module path. Raises ModelError if missing or incomplete."""
    path = Path(folder) / "saap" / PACKED_FILE
    if not path.is_file():
        raise ModelError(f"{folder} has no packed weights", "Give a folder written by `saap recover`")
    with open_safetensors(path) as file:
        try:
            layouts = [(name, bits, size) for name, (bits, size) in json.loads(file.metadata()["groupwise"]).items()]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{path} is damaged ({error})", "Copy the file again") from None
        return {
            name: GroupwiseWeight(
                **{part: file.get_tensor(f"{name}.{part}") for part in _PARTS}, bits=bits, group_size=size
            )
            for name, bits, size in layouts
        }


def q4_1_blocks(weight: GroupwiseWeight, rows: slice = slice(None)) -> Tensor:
    """Rows of the weight as GGUF blocks of type Q4_1, (out, in / 32 * 20) uint8.

    A block of 32 weights has its scale and minimum in float16 and 16 bytes of codes. Codes and scales are copied
    exactly; the minimum is the zero point rounded to float16. weight: of 4 bits in groups of 32.
    """
    numbers = torch.stack([weight.scale[rows], weight.zero[rows].half()], dim=-1).contiguous().view(torch.uint8)
    return torch.cat([numbers, weight.packed[rows]], dim=-1).flatten(1)
