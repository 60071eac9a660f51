"""The checkpoint: a Hugging Face folder in either layout, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from saap.core.manifest import RunManifest
from saap.core.records import ImportanceScores, Layout, ModelGraph, StructurePlan
from saap.core.storage import write_plan, write_scores, write_whole
from saap.export.config_files import adaptive_config, stock_config, with_both_rope_spellings
from saap.export.model_card import model_card
from saap.export.placing import check_output, whole_folder
from saap.models.checkpoint import modeling_pruned
from saap.models.checkpoint.groupwise import GroupwiseLinear
from saap.models.checkpoint.modeling_pruned import MODEL_TYPE
from saap.models.checkpoint.pruned_structure import PrunedStructure
from saap.models.checkpoint.safetensor_files import INDEX_NAME, TensorEntry, write_tensors
from saap.models.walk.offload import OffloadedWeights, offloaded

SHARD_SIZE = "2GB"
# How a model that reads images cuts them up and writes them into a prompt.
_IMAGE_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
_LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointParts:
    """What goes into a folder besides the weights. source_folder: of the dense model, for its licence files."""

    graph: ModelGraph
    plan: StructurePlan
    structure: PrunedStructure
    manifest: RunManifest
    scores: ImportanceScores | None = None
    tokenizer: Any | None = None
    source_folder: Path | None = None


def write_checkpoint(
    model: nn.Module, parts: CheckpointParts, out: Path, *, dtype: torch.dtype, overwrite: bool = False
) -> Path:
    """Write the pruned `model` (not changed) with weights in `dtype`, in the plan's layout. Returns `out`.

    Raises OutputError if `out` exists (and not `overwrite`), cannot be written or does not fit on the disk; LayoutError
    if the layout cannot express the plan.
    """
    check_output(out, entry_bytes(stored_entries(model, dtype)), overwrite=overwrite)
    changed: Mapping[str, Tensor] = {}
    if parts.plan.layout is Layout.UNIFORM:
        config, changed = stock_config(model, parts.graph, parts.plan, parts.structure)
    else:
        config = adaptive_config(model, parts.structure)
    entries = stored_entries(model, dtype, changed)
    with model_folder(out, model, config, dtype, entries, parts.tokenizer, parts.source_folder) as folder:
        write_records(folder, parts.manifest, parts.structure.base_model_type)
        write_plan(folder / "saap" / "plan.json", parts.plan, parts.graph)
        if parts.scores is not None:
            write_scores(folder / "saap" / "scores.safetensors", parts.scores)
    return out


@contextmanager
def model_folder(
    out: Path, model: nn.Module, config: Any, dtype: torch.dtype, entries: Mapping[str, TensorEntry],
    tokenizer: Any | None, source_folder: Path | None,
) -> Iterator[Path]:  # fmt: skip
    """A folder that transformers opens, to add records to; it is at `out`, whole, when the block ends well.

    source_folder: of the model that this one was made from, for its licence files. Raises OutputError.
    """
    with whole_folder(out) as folder:
        write_config(config, folder, dtype)
        if config.model_type == MODEL_TYPE:
            shutil.copyfile(modeling_pruned.__file__, folder / Path(modeling_pruned.__file__).name)
        _write_shards(entries, folder)
        write_companions(model, tokenizer, source_folder, folder)
        yield folder


def write_records(folder: Path, manifest: RunManifest, base_model_type: str) -> None:
    """Write manifest and model card into a checkpoint folder."""
    write_whole(folder / "saap" / "manifest.json", (manifest.model_dump_json(indent=2) + "\n").encode())
    write_whole(folder / "README.md", model_card(manifest, base_model_type).encode())


def modeling_code_digest() -> str:
    """sha256 (hex) of the `modeling_pruned.py` that adaptive folders carry."""
    return hashlib.sha256(Path(modeling_pruned.__file__).read_bytes()).hexdigest()


def stored_entries(
    model: nn.Module, dtype: torch.dtype, changed: Mapping[str, Tensor] | None = None
) -> dict[str, TensorEntry]:
    """Every tensor of a plain checkpoint of `model` by name, each made when it is written.

    Of tied tensors the first name only: the loader ties them again. Packed layers give their full weight under the name
    that it had. changed: in place of the model's own, by name.
    """
    away = offloaded(model)

    def entry(tensor: Tensor) -> TensorEntry:
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        return TensorEntry(dtype=kept, shape=tuple(tensor.shape), make=partial(_value, tensor, kept, away))

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
            entries[name] = entry(tensor)
    return entries | {name: entry(tensor) for name, tensor in (changed or {}).items()}


def _value(tensor: Tensor, dtype: torch.dtype, away: OffloadedWeights | None) -> Tensor:
    return (tensor if away is None else away.value(tensor)).detach().to(dtype)


def entry_bytes(entries: Mapping[str, TensorEntry]) -> int:
    """Bytes of all of them as written."""
    return sum(torch.Size(entry.shape).numel() * entry.dtype.itemsize for entry in entries.values())


def write_config(config: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json so that older and newer versions of transformers read it."""
    config.save_pretrained(folder)
    file = folder / "config.json"
    fields = with_both_rope_spellings(json.loads(file.read_text(encoding="utf-8")))
    fields.pop("_name_or_path", None)
    fields["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_shards(entries: Mapping[str, TensorEntry], folder: Path) -> None:
    """Tensor by tensor, so that no second copy of the model is held."""
    sizes = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: entries[name] for name in names}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _use_the_old_tokenizer_name(file: Path) -> None:
    """Name a tokenizer that is all in tokenizer.json as every version of transformers knows it."""
    if file.is_file():
        fields = json.loads(file.read_text(encoding="utf-8"))
        if fields.get("tokenizer_class") == "TokenizersBackend":
            fields["tokenizer_class"] = "PreTrainedTokenizerFast"
            file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_companions(model: nn.Module, tokenizer: Any | None, source_folder: Path | None, folder: Path) -> None:
    """Write generation settings, tokenizer, and the source's image settings and licence files."""
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        _use_the_old_tokenizer_name(folder / "tokenizer_config.json")
    if source_folder is not None:
        for pattern in (*_LEGAL_FILES, *_IMAGE_FILES):
            for file in source_folder.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
