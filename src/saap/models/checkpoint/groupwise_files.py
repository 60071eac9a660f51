"""Packed weights on disk, and models whose linear layers hold packed weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from saap.core.errors import ModelError
from saap.models.checkpoint.groupwise import GroupwiseLinear, GroupwiseWeight
from saap.models.checkpoint.safetensor_files import TensorEntry, TensorReader, weight_files, write_tensors
from saap.models.loading.references import ResolvedModel
from saap.models.structure.linear import contracted_axis, linear_modules, owner, weight_out_in

PACKED_FILE = "packed.safetensors"
"""In the folder `saap` of a checkpoint, where no loader of plain weights looks."""
Q4_1_GROUP = 32
_PARTS = ("packed", "scale", "zero")

WeightOf = Callable[[str, Callable[[], Tensor]], GroupwiseWeight]


def write_packed(path: Path, weights: Mapping[str, GroupwiseWeight]) -> None:
    """Write packed weights by module path, tensor by tensor: `PATH.packed`, `PATH.scale` and `PATH.zero`."""
    entries: dict[str, TensorEntry] = {}
    for name, weight in weights.items():
        for part in _PARTS:
            entries[f"{name}.{part}"] = TensorEntry.of(getattr(weight, part))
    formats = {name: [weight.bits, weight.group_size] for name, weight in weights.items()}
    write_tensors(path, entries, {"format": "pt", "groupwise": json.dumps(formats)})


def read_packed(folder: str | Path) -> dict[str, GroupwiseWeight]:
    """The packed weights of a checkpoint folder by module path. Raises ModelError if it has none, or not whole."""
    path = Path(folder) / "saap" / PACKED_FILE
    if not path.is_file():
        raise ModelError(f"{folder} has no packed weights", "Give a folder that `saap recover` has written")
    with _opened(path) as (file, formats):
        return {
            name: GroupwiseWeight(
                **{part: file.get_tensor(f"{name}.{part}") for part in _PARTS}, bits=bits, group_size=group_size
            )
            for name, (bits, group_size) in formats.items()
        }


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, tuple[int, int]]]]:
    """A file of packed weights, open, with the bits and group size of each by name. Raises ModelError if damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads(file.metadata()["groupwise"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({error})", "Copy the file again") from None


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
        with _opened(self._path) as (_, formats):
            for path, (bits, group_size) in formats.items():
                if (bits, group_size) == (4, Q4_1_GROUP):
                    self.names.add(f"{path}.weight")
                else:
                    self.refused = f"{PACKED_FILE} has {bits} bits in groups of {group_size}"

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first..last-1 of a weight as blocks, see `q4_1_blocks`."""
        path = name.removesuffix(".weight")
        with safe_open(self._path, framework="pt") as file:
            parts = {part: file.get_slice(f"{path}.{part}")[first:last] for part in _PARTS}
        return q4_1_blocks(GroupwiseWeight(**parts, bits=4, group_size=Q4_1_GROUP))


def linears_inside(model: nn.Module, blocks: Sequence[str]) -> dict[str, int]:
    """Path and input size of every linear layer inside the decoder blocks at these paths."""
    inside = tuple(f"{block}." for block in blocks)
    return {
        path: weight_out_in(module).shape[1]
        for path, module in linear_modules(model).items()
        if path.startswith(inside)
    }


def pack_linear(
    model: nn.Module, path: str, weight: GroupwiseWeight, device: torch.device, bias: nn.Parameter | None = None
) -> None:
    """Replace the linear layer at a path by one of packed weights, in place. bias: None for that of the layer."""
    module = model.get_submodule(path)
    bias = bias if bias is not None else module._parameters.get("bias")
    model.set_submodule(path, GroupwiseLinear(weight, bias, transposed=contracted_axis(module) == 0).to(device))


@torch.no_grad()
def pack_linears(model: nn.Module, paths: Collection[str], weight_of: WeightOf, device: torch.device) -> None:
    """Replace the linear layers at these paths of a loaded model one by one, in place."""
    for path in paths:
        pack_linear(model, path, weight_of(path, partial(weight_out_in, model.get_submodule(path))), device)


def open_empty(resolved: ResolvedModel, dtype: torch.dtype) -> tuple[Any, TensorReader] | None:
    """The model without weights (they are on the meta device) and a reader of its files.

    None where the files do not hold the model's weights name by name (a GGUF file, a family that renames on loading),
    or the model needs code of its own: such a model is opened whole.
    """
    if resolved.gguf_file is not None or resolved.trust_remote_code:
        return None
    try:
        config = AutoConfig.from_pretrained(resolved.folder)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError):
        return None  # opening it whole says what is wrong
    if (resolved.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(resolved.folder)
    model.tie_weights()
    reader = TensorReader(weight_files(resolved.folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in stored_buffers(model).items()}
    return (model, reader) if all(reader.shape(name) == shape for name, shape in shapes.items()) else None


@torch.no_grad()
def fill(
    model: Any,
    reader: TensorReader,
    paths: Collection[str],
    weight_of: WeightOf,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """Give an empty model its weights tensor by tensor; those of the linear layers at these paths become packed.

    device, dtype: of all others, and to compute in.
    """

    def read(name: str) -> Tensor:
        tensor = reader.read(name).to(device)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    for path in paths:
        transposed = contracted_axis(model.get_submodule(path)) == 0
        weight = weight_of(path, partial(_out_in, read, f"{path}.weight", transposed=transposed))
        bias = nn.Parameter(read(f"{path}.bias"), requires_grad=False) if "bias" in reader.names(path) else None
        pack_linear(model, path, weight, device, bias)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            holder, attribute = owner(model, name)
            holder._parameters[attribute] = nn.Parameter(read(name), requires_grad=False)
    for name in stored_buffers(model):
        holder, attribute = owner(model, name)
        if not isinstance(holder, GroupwiseLinear):
            holder._buffers[attribute] = reader.read(name)
    model.tie_weights()
    return model.to(device)


def _out_in(read: Callable[[str], Tensor], name: str, *, transposed: bool) -> Tensor:
    return read(name).T if transposed else read(name)


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of a model that its files hold, by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in parameters}
