"""Removal of whole experts from a folder of quantised safetensors: what stays has the source's bytes and format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saap.core.errors import ExportError, listed
from saap.core.records import CoupledGroup, ModelGraph, Role
from saap.export.huggingface import FOLDER_FILES, IMAGE_FILES, copy_matching, entry_bytes, write_json, write_shards
from saap.models.checkpoint.safetensor_files import StoredTensors, TensorEntry, weight_files

_NUMBERED = re.compile(r"(?P<before>.*\bexperts\.)(?P<number>\d+)(?P<after>\..*|$)")
_PREDICTION = ("mtp",)
"""Modules of multi-token prediction that are outside the model's blocks, at its root."""
_PREDICTION_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
_REMEDY = "Use --restore, which writes a folder of dequantised weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a tensor has experts: on its axis 0, or, with a `number`, it is of one of them."""

    layer: int
    number: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderExperts:
    """The experts of a folder. type: format of its weights. count: experts of each layer.

    fields: of config.json that have this number, by path. blocks: paths of the layers with experts. places: of the
    tensors that belong to experts, by name. left_out: tensors of multi-token prediction layers with experts. The
    model does not have these, so their experts have no scores; programs use them for speculative decoding only.
    """

    folder: Path
    type: str
    count: int
    stored: StoredTensors
    fields: tuple[tuple[str, ...], ...]
    blocks: Mapping[int, str]
    places: Mapping[str, _Place]
    left_out: frozenset[str] = frozenset()

    def nbytes(self, keep: Mapping[int, Sequence[int]]) -> int:
        """Bytes of the tensors with the experts `keep` of each layer."""
        return entry_bytes(self._entries(keep))

    def write(self, out: Path, keep: Mapping[int, Sequence[int]]) -> None:
        """Write weights, configuration and companions of the folder into `out` with the experts `keep` of each layer.

        Every layer keeps the same number.
        """
        (kept,) = {len(numbers) for numbers in keep.values()}
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        for *outer, name in self.fields:
            holder = config
            for field in outer:
                holder = holder[field]
            holder[name] = holder[name] // self.count * kept
        for name in _PREDICTION_FIELDS if self.left_out else ():
            for holder in (config, config.get("text_config")):
                if isinstance(holder, dict) and name in holder:
                    holder[name] = 0
        settings = config["quantization_config"]
        for name, value in settings.items():
            if isinstance(value, list) and all(isinstance(one, str) for one in value):  # modules in another format
                settings[name] = [new for one in value if (new := self._module(one, keep)) is not None]
        write_json(out / "config.json", config)
        write_shards(self._entries(keep), out)
        code = ("*.py",) if "auto_map" in config else ()
        copy_matching(self.folder, out, (*FOLDER_FILES, *IMAGE_FILES, *code))

    def _module(self, name: str, keep: Mapping[int, Sequence[int]]) -> str | None:
        """The path of a module after the removal; None if it is removed."""
        if any(left.startswith(f"{name}.") for left in self.left_out):
            return None
        layer = next((layer for layer, block in self.blocks.items() if name.startswith(f"{block}.")), None)
        return name if layer is None else _renumbered(name, keep[layer])

    def _entries(self, keep: Mapping[int, Sequence[int]]) -> dict[str, TensorEntry]:
        """The tensors to write by their new names, each read when it is written."""
        entries: dict[str, TensorEntry] = {}
        for name, shape in self.stored.shapes.items():
            if name in self.left_out:
                continue
            place = self.places.get(name)
            rows = None if place is None or place.number is not None else list(keep[place.layer])
            new = name if place is None or rows is not None else _renumbered(name, keep[place.layer])
            if new is not None:
                shape = shape if rows is None else (len(rows), *shape[1:])
                read = partial(_read, self.stored, name, rows)
                entries[new] = TensorEntry(dtype=self.stored.dtypes[name], shape=shape, make=read)
        return entries


def _renumbered(name: str, kept: Sequence[int]) -> str | None:
    """The name of an expert's module or tensor by its new number; None if the expert is removed."""
    found = _NUMBERED.fullmatch(name)
    if found is None:
        return name
    number = int(found["number"])
    return f"{found['before']}{list(kept).index(number)}{found['after']}" if number in kept else None


def _read(stored: StoredTensors, name: str, rows: list[int] | None) -> Tensor:
    tensor = stored.read(name)
    if rows is None:
        return tensor
    raw = tensor.reshape(len(tensor), -1).view(torch.uint8)  # not every type of weights can be indexed
    return raw[rows].view(tensor.dtype).reshape(len(rows), *tensor.shape[1:])


def open_expert_folder(folder: Path, quantisation: str, graph: ModelGraph, config: Any) -> FolderExperts:
    """Where the experts of a folder are. graph: of a model with some. config: of transformers.

    Raises ExportError for tensors or a configuration that cannot be cut.
    """
    stored = StoredTensors.in_files(weight_files(folder))
    layers: dict[int, list[CoupledGroup]] = {}
    for group in graph.of_role(Role.EXPERT):  # a layer has several if its router chooses among groups of experts
        layers.setdefault(group.layer, []).append(group)
    places: dict[str, _Place] = {}
    for layer, groups in layers.items():
        places |= _places(groups, graph.blocks[layer], stored)
    prediction = frozenset(name for name in stored.shapes if _of_prediction(name, graph.blocks))
    left_out = prediction if any(".experts." in name for name in prediction) else frozenset[str]()
    others = [name for name in stored.shapes if ".experts." in name and name not in {*places, *left_out}]
    if others:
        raise ExportError(f"{folder} has experts that are not in the model ({listed(others, 2)})", _REMEDY)
    counts = sorted({sum(group.units for group in groups) for groups in layers.values()})
    if len(counts) > 1:
        raise ExportError(f"{folder} has layers of {listed([str(count) for count in counts], 4)} experts", _REMEDY)
    names = [field.name for field in graph.config_fields if field.role is Role.EXPERT]
    return FolderExperts(
        folder=folder, type=quantisation, count=counts[0], stored=stored, places=places,
        fields=_fields(folder, names, config), blocks={layer: graph.blocks[layer] for layer in layers},
        left_out=left_out,
    )  # fmt: skip


def _of_prediction(name: str, blocks: Sequence[str]) -> bool:
    """Whether a tensor is of a multi-token prediction layer: after the last block, or a module of its own."""
    stack, _, _ = blocks[0].rpartition(".")
    number = name.removeprefix(f"{stack}.").partition(".")[0] if name.startswith(f"{stack}.") else ""
    return (number.isdecimal() and int(number) >= len(blocks)) or name.partition(".")[0] in _PREDICTION


def _places(groups: Sequence[CoupledGroup], block: str, stored: StoredTensors) -> dict[str, _Place]:
    """The tensors of one layer's experts, and the rows of its router, by name.

    Names in published files are older than those of the model; the last two parts of a router's are not.
    """
    slices = [one for group in groups for one in (*group.members, *group.buffers)]
    routers = {_tail(one.tensor) for one in slices if ".experts." not in f".{one.tensor}"}
    layer, count = groups[0].layer, sum(group.units for group in groups)
    found: dict[str, _Place] = {}
    numbers, strange = set[int](), []
    for name, shape in stored.shapes.items():
        if not name.startswith(f"{block}."):
            continue
        numbered = _NUMBERED.fullmatch(name)
        if numbered is not None:
            found[name] = _Place(layer=layer, number=int(numbered["number"]))
            numbers.add(int(numbered["number"]))
        elif ".experts." in name or _tail(name) in routers:
            found[name] = _Place(layer=layer)
            strange += [name] if shape[:1] != (count,) else []
        elif any(_tail(name).startswith(router) for router in routers):
            strange.append(name)  # a scale
    missing = routers - {_tail(name) for name in found}
    if strange or missing or (numbers and numbers != set(range(count))):
        problem = f"The experts of {block} are stored in a way that cannot be cut"
        raise ExportError(f"{problem} ({listed([*strange, *sorted(missing)], 4) or 'some are missing'})", _REMEDY)
    return found


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _fields(folder: Path, names: Sequence[str], config: Any) -> tuple[tuple[str, ...], ...]:
    """Paths of the numbers of experts in config.json. names: of fields in transformers. Raises ExportError."""
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get_text_config()
    known = {alias for alias, name in text.attribute_map.items() if name in names} | set(names)
    inner = written.get("text_config")
    found: list[tuple[str, ...]] = [(name,) for name in sorted(known) if isinstance(written.get(name), int)]
    found += [("text_config", name) for name in sorted(known) if isinstance((inner or {}).get(name), int)]
    if not found:
        raise ExportError(f"{folder / 'config.json'} has no field {' or '.join(sorted(known))}", _REMEDY)
    return tuple(found)
