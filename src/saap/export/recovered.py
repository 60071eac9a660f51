"""The folder of a tuned model: plain weights that open everywhere, and the packed integers beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from saap.core.manifest import RunManifest
from saap.export.huggingface import SHARD_SIZE, check_output, whole_folder, write_companions, write_config
from saap.export.model_card import model_card
from saap.models.checkpoint import modeling_pruned
from saap.models.checkpoint.groupwise import GroupwiseLinear, GroupwiseWeight
from saap.models.checkpoint.groupwise_files import PACKED_FILE, write_packed
from saap.models.checkpoint.modeling_pruned import MODEL_TYPE
from saap.models.checkpoint.safetensor_files import INDEX_NAME, TensorEntry, write_tensors

KEPT_RECORDS = ("plan.json", "scores.safetensors")
"""Files of the source's folder `saap` that still hold of the tuned model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredParts:
    """What goes into the folder besides the weights. source_folder: of the model that was tuned.

    packed: by module path, none for a model that was not quantised.
    """

    manifest: RunManifest
    base_model_type: str
    packed: Mapping[str, GroupwiseWeight]
    tokenizer: Any | None = None
    source_folder: Path | None = None


def stored_entries(model: nn.Module, dtype: torch.dtype) -> dict[str, TensorEntry]:
    """Every tensor of a plain checkpoint of `model` by name, each made when it is written; tied ones once.

    Packed layers give their full weight under the name that it had.
    """
    entries: dict[str, TensorEntry] = {}
    packed = {path: module for path, module in model.named_modules() if isinstance(module, GroupwiseLinear)}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, attribute = name.rpartition(".")
        if path in packed and attribute in ("packed", "scale", "zero"):
            shape = packed[path].quantised.shape
            stored = shape[::-1] if packed[path].transposed else shape
            entries[f"{path}.weight"] = TensorEntry(
                dtype=dtype, shape=stored, make=partial(packed[path].stored_weight, dtype)
            )
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            kept = dtype if tensor.is_floating_point() else tensor.dtype
            entries[name] = TensorEntry(dtype=kept, shape=tuple(tensor.shape), make=partial(tensor.detach().to, kept))
    return entries


def entry_bytes(entries: Mapping[str, TensorEntry]) -> int:
    """Bytes of all of them as written."""
    return sum(torch.Size(entry.shape).numel() * entry.dtype.itemsize for entry in entries.values())


def write_recovered(
    model: Any, parts: RecoveredParts, out: Path, *, dtype: torch.dtype, overwrite: bool = False
) -> Path:
    """Write the tuned `model` (adapters merged) whole or not at all; no second copy of it is held.

    Raises OutputError if `out` exists (and not `overwrite`), cannot be written or does not fit on the disk.
    """
    entries = stored_entries(model, dtype)
    needed = entry_bytes(entries) + sum(weight.nbytes for weight in parts.packed.values())
    check_output(out, needed, overwrite=overwrite)
    with whole_folder(out) as folder:
        write_config(model.config, folder, dtype)
        if model.config.model_type == MODEL_TYPE:
            shutil.copyfile(modeling_pruned.__file__, folder / Path(modeling_pruned.__file__).name)
        _write_shards(entries, folder)
        write_companions(model, parts.tokenizer, parts.source_folder, folder)
        records = folder / "saap"
        records.mkdir()
        if parts.source_folder is not None:
            for name in KEPT_RECORDS:
                if (parts.source_folder / "saap" / name).is_file():
                    shutil.copyfile(parts.source_folder / "saap" / name, records / name)
        if parts.packed:
            write_packed(records / PACKED_FILE, parts.packed)
        (records / "manifest.json").write_text(parts.manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(parts.manifest, parts.base_model_type), encoding="utf-8")
    return out


def _write_shards(entries: Mapping[str, TensorEntry], folder: Path) -> None:
    sizes = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: entries[name] for name in names}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
