"""Offloading: weights stay in their files and are in memory only while they are used.

A decoder block is onloaded when it is called, and offloaded when another block is called; so is the output head. Of the
input embeddings only the rows of the given tokens are read. All code that calls the blocks, above all the block walker,
works with such a model as with any other. An offloaded weight keeps its shape, type and device, but all entries are
NaN, so accidental use is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors

from saap.core.errors import ModelError, StaleInputError
from saap.models.checkpoint.safetensor_files import StoredTensors, TensorEntry, write_tensors
from saap.models.structure.linear import embedding_of

_ATTRIBUTE = "_offloaded_weights"
# Modules outside the blocks that are smaller than this stay in memory.
SMALL_BYTES = 16 * 2**20


@dataclass(slots=True, eq=False)
class Part:
    """Modules that are onloaded and offloaded together: a decoder block, or the large modules around the blocks.

    modules: by path. sources: functions that read the stored weights, by the names in `named_parameters`. changed:
    whether the weights in memory differ from the stored ones. written: whether the stored ones were changed before.
    """

    modules: Mapping[str, nn.Module]
    sources: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    changed: bool = False
    written: bool = False

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by path and name, a tied one once."""
        found: dict[nn.Parameter, str] = {}
        for path, module in self.modules.items():
            for name, parameter in module.named_parameters(prefix=path):
                found.setdefault(parameter, name)
        return {name: parameter for parameter, name in found.items()}


@dataclass(slots=True, eq=False)
class OffloadedWeights:
    """Location of the weights of one model. At most one part of it is in memory.

    dtype: to compute in. blocks: paths of the decoder blocks. rounded: type to round values to, if coarser. folder: of
    the files of changed parts, None as long as nothing may change. written: type in these files, if not dtype.
    parts_read: number of reads of a part.
    """

    device: torch.device
    dtype: torch.dtype
    blocks: tuple[str, ...]
    parts: list[Part] = field(default_factory=list)
    rounded: torch.dtype | None = None
    written: torch.dtype | None = None
    folder: Path | None = None
    parts_read: int = 0
    _onloaded: Part | None = None

    @torch.no_grad()
    def onload(self, part: Part) -> None:
        """Onload `part`, and offload all others."""
        if self._onloaded is part:
            return
        parameters = part.named_parameters()
        needed = {parameter.shape for parameter in parameters.values()}
        spare = [tensor for tensor in self.offload() if tensor.shape in needed]
        self._onloaded = part
        self.parts_read += 1
        for name, parameter in parameters.items():
            stored = self.round(part.sources[name]())
            dtype = self.dtype if stored.is_floating_point() else stored.dtype
            # reuse the memory of a weight just offloaded if possible: new pages cost time
            alike = (one.shape == stored.shape and one.dtype == dtype and one.is_contiguous() for one in spare)
            place = next((index for index, fits in enumerate(alike) if fits), None)
            new = torch.empty(stored.shape, dtype=dtype, device=self.device) if place is None else spare.pop(place)
            parameter.data = new.copy_(stored)

    @torch.no_grad()
    def offload(self) -> list[Tensor]:
        """Offload all parts; changed weights are written first. Returns the memory of the offloaded weights."""
        part, self._onloaded = self._onloaded, None
        if part is None:
            return []
        if part.changed:
            self._write(part)
        spare = []
        for parameter in part.named_parameters().values():
            spare.append(parameter.data)
            parameter.data = placeholder(parameter.shape, parameter.dtype, parameter.device)
        return spare

    def value(self, parameter: Tensor) -> Tensor:
        """The value of a parameter: itself, or the stored one if it is offloaded."""
        for part in self.parts:
            for name, weight in part.named_parameters().items() if part is not self._onloaded else ():
                if weight is parameter:
                    return self.round(part.sources[name]())
        return parameter

    def always_onloaded(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters of the model that are always in memory."""
        others = {parameter for part in self.parts for parameter in part.named_parameters().values()}
        return [parameter for parameter in model.parameters() if parameter not in others]

    def round_to(self, dtype: torch.dtype) -> None:
        """From now on, round the weights that are read to values of `dtype`."""
        self.offload()
        self.rounded = dtype

    def round(self, stored: Tensor) -> Tensor:
        """A stored weight in the compute type."""
        return stored.to(self.rounded) if self.rounded is not None and stored.is_floating_point() else stored

    def part_of(self, path: str) -> Part:
        """The part of a module of that path."""
        return next(part for part in self.parts if path in part.modules)

    @torch.no_grad()
    def read_written(self, path: str) -> None:
        """Load the changed weights that an earlier run has written for the part of a module, cut to their shapes.

        Raises StaleInputError if they are missing or damaged, or of other shapes.
        """
        part = self.part_of(path)
        file = self._file(part)
        self.onload(part)
        parameters = part.named_parameters()
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        try:
            files = StoredTensors.in_files((file,))
        except ModelError as error:
            raise StaleInputError(error.offender, f"Delete {file.parent}") from None
        if files.shapes != shapes:
            raise StaleInputError(f"{file} does not have the weights of {path}", f"Delete {file.parent}")
        for name, parameter in parameters.items():
            parameter.copy_(files.read(name))
        part.sources = {name: partial(files.read, name) for name in parameters}
        part.changed, part.written = False, True

    def _file(self, part: Part) -> Path:
        """File of the part's weights once they are changed."""
        if self.folder is None:
            raise RuntimeError(f"{next(iter(part.modules))} was changed, but there is no folder for changed weights")
        return self.folder / f"{self.parts.index(part):05d}.safetensors"

    def _write(self, part: Part) -> None:
        path, dtype = self._file(part), self.dtype if self.written is None else self.written
        entries = {
            name: TensorEntry(dtype=dtype, shape=tuple(weight.shape), make=partial(weight.to, dtype))
            for name, weight in part.named_parameters().items()
        }
        write_tensors(path, entries, {"format": "pt"})
        files = StoredTensors.in_files((path,))
        part.sources = {name: partial(files.read, name) for name in entries}
        part.changed, part.written = False, True


def placeholder(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor without own memory: all entries are one NaN, or zero for a type without NaN."""
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((1,) * len(shape), value, dtype=dtype, device=device).expand(tuple(shape))


def offloaded(model: nn.Module) -> OffloadedWeights | None:
    """Offloading state of `model`; None for a model in memory."""
    found = vars(model).get(_ATTRIBUTE)
    return found if isinstance(found, OffloadedWeights) else None


def onload(model: nn.Module, name: str, *, change: bool = False) -> None:
    """Onload the part of the module or weight `name`.

    change: whether its weights will be changed. Has no effect on a model in memory, or parts that always are.
    """
    weights = offloaded(model)
    parts = [] if weights is None else weights.parts
    part = next((part for part in parts for path in part.modules if f"{name}.".startswith(f"{path}.")), None)
    if weights is not None and part is not None:
        weights.onload(part)
        part.changed |= change


def share_weights(model: nn.Module, other: nn.Module) -> None:
    """Share the weights of an offloaded model with another one of the same paths, part by part, in place."""
    weights = offloaded(model)
    if weights is None:
        raise ValueError("the model is in memory")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holder, _, attribute = name.rpartition(".")
        other.get_submodule(holder)._parameters[attribute] = parameter
    for part in weights.parts:
        for path in part.modules:
            _read_when_called(other.get_submodule(path), part, weights)
    embedding = _input_embedding(model)
    if embedding is not None:
        path = next(path for path, module in model.named_modules() if module is embedding)
        vars(other.get_submodule(path))["forward"] = embedding.forward


@torch.no_grad()
def offload(model: nn.Module, blocks: Sequence[str], files: StoredTensors, *, device: torch.device) -> OffloadedWeights:
    """Let a model on the meta device read its weights lazily from files, in place.

    blocks: paths of the decoder blocks. Weights of small modules outside the blocks are read now.
    """
    weights = OffloadedWeights(device, next(model.parameters()).dtype, tuple(blocks))
    stored_names: dict[Tensor, str] = {}
    for name, parameter in list(model.named_parameters()):
        new = placeholder(parameter.shape, parameter.dtype, device)
        swap_tensors(parameter, nn.Parameter(new, requires_grad=False))  # type: ignore[no-untyped-call]
        stored_names[parameter] = name

    def add(modules: Mapping[str, nn.Module]) -> Part:
        part = Part(modules)
        own = part.named_parameters()
        part.sources = {name: partial(files.read, stored_names[parameter]) for name, parameter in own.items()}
        weights.parts.append(part)
        return part

    embedding = _input_embedding(model)
    # Modules outside the blocks are one part: the gradient of the logits may need several of them at once.
    inside = tuple(f"{path}." for path in blocks)
    around = {
        path: module
        for path, module in model.named_modules()
        if not f"{path}.".startswith(inside) and not module._modules and module is not embedding and _large(module)
    }
    for modules in [*({path: model.get_submodule(path)} for path in blocks), *([around] if around else [])]:
        part = add(modules)
        for module in modules.values():
            _read_when_called(module, part, weights)
    if embedding is not None:
        name = stored_names[embedding.weight]
        _look_up_rows(embedding, name, files, weights)
        if not any(weight is embedding.weight for module in around.values() for weight in module.parameters()):
            add({name.removesuffix(".weight"): embedding})
    for parameter in weights.always_onloaded(model):
        stored = files.read(stored_names[parameter])
        parameter.data = stored.to(device, weights.dtype if stored.is_floating_point() else stored.dtype, copy=True)
    vars(model)[_ATTRIBUTE] = weights
    return weights


def _large(module: nn.Module) -> bool:
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    return 0 < size >= SMALL_BYTES


def _input_embedding(model: nn.Module) -> nn.Embedding | None:
    """The input embeddings if they are too large to stay in memory."""
    found = embedding_of(model, "input")
    return found if isinstance(found, nn.Embedding) and _large(found) else None


def _read_when_called(module: nn.Module, part: Part, weights: OffloadedWeights) -> None:
    """Wrap the module's own forward, as accelerate's hooks do: a bypassed block is not read."""
    stock = module.forward

    @wraps(stock)
    def forward(*arguments: Any, **keywords: Any) -> Any:
        weights.onload(part)
        return stock(*arguments, **keywords)

    module.forward = forward


def _look_up_rows(embedding: nn.Embedding, name: str, files: StoredTensors, weights: OffloadedWeights) -> None:
    """Let the embedding read only the rows of its tokens."""

    def forward(tokens: Tensor) -> Tensor:
        rows, places = torch.unique(tokens, return_inverse=True)
        table = weights.round(files.read(name)[rows.cpu()]).to(weights.device, weights.dtype)
        whole, padding = embedding._parameters["weight"], embedding.padding_idx
        embedding._parameters["weight"] = nn.Parameter(table, requires_grad=False)
        embedding.padding_idx = None
        try:
            found: Tensor = stock(places)
        finally:
            embedding._parameters["weight"], embedding.padding_idx = whole, padding
        return found

    stock = embedding.forward
    vars(embedding)["forward"] = wraps(stock)(forward)
