"""The checkpoint: a Hugging Face folder in either layout, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from saap.core.errors import OutputError
from saap.core.manifest import RunManifest
from saap.core.records import ImportanceScores, Layout, ModelGraph, StructurePlan
from saap.core.storage import write_plan, write_scores
from saap.export.config_files import adaptive_config, stock_config, with_both_rope_spellings
from saap.export.model_card import model_card
from saap.export.placing import check_place, remove_leftovers
from saap.models.checkpoint import modeling_pruned
from saap.models.checkpoint.differences import PrunedStructure
from saap.models.checkpoint.safetensor_files import TensorEntry, write_tensors
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
class WrittenCheckpoint:
    """A finished folder. weight_bytes: size of its safetensors files."""

    path: Path
    weight_bytes: int


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
) -> WrittenCheckpoint:
    """Write the pruned `model` (not changed) with weights in `dtype`, in the plan's layout.

    Everything is written to a sibling folder, flushed, and renamed. Raises OutputError if `out` exists (and not
    `overwrite`), cannot be written or does not fit on the disk; LayoutError if the layout cannot express the plan.
    """
    check_output(out, weight_bytes(model, dtype), overwrite=overwrite)
    if parts.plan.layout is Layout.UNIFORM:
        config, changed = stock_config(model, parts.graph, parts.plan, parts.structure)
    else:
        changed = {}
        config = adaptive_config(model, parts.structure)
    with whole_folder(out) as folder:
        write_config(config, folder, dtype)
        if parts.plan.layout is Layout.ADAPTIVE:
            shutil.copyfile(modeling_pruned.__file__, folder / Path(modeling_pruned.__file__).name)
        _write_weights(model, folder, dtype, changed)
        write_companions(model, parts.tokenizer, parts.source_folder, folder)
        _write_records(parts, folder)
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return WrittenCheckpoint(path=out, weight_bytes=written)


def modeling_code_digest() -> str:
    """sha256 (hex) of the `modeling_pruned.py` that adaptive folders carry."""
    return hashlib.sha256(Path(modeling_pruned.__file__).read_bytes()).hexdigest()


def check_output(out: Path, needed_bytes: int, *, overwrite: bool) -> None:
    """Raise OutputError now if `out` could not be written later. needed_bytes: of the weights."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out} exists and is no folder", "Choose another --out")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise OutputError(f"The folder {out} exists", "Choose another --out, or use --overwrite")
        if not (out / "config.json").is_file():
            raise OutputError(f"The folder {out} holds something that is no model", "Choose another --out")
    check_place(out, needed_bytes)


def weight_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the model's weights when written in `dtype`; tied ones count once."""
    return sum(
        tensor.numel() * (dtype if tensor.is_floating_point() else tensor.dtype).itemsize
        for tensor in _tensors(model).values()
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything to write by name; of tied tensors the first name only, the loader ties them again."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends well, and vanishes when it does not."""
    part = out.with_name(f".{out.name}.part-{uuid.uuid4().hex[:8]}")
    try:
        part.mkdir(parents=True)
        yield part
        for path in [*part.rglob("*"), part]:
            _flush(path)
        if out.exists():
            old = out.with_name(f".{out.name}.old-{uuid.uuid4().hex[:8]}")
            out.rename(old)
            try:
                part.rename(out)
            except BaseException:
                old.rename(out)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            part.rename(out)
        _flush(out.absolute().parent)
        remove_leftovers(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{out} cannot be written ({reason})", "Free some space, or choose another --out") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _flush(path: Path) -> None:
    """Force a file or folder to the disk, where the system can."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_config(config: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json so that older and newer versions of transformers read it."""
    config.save_pretrained(folder)
    file = folder / "config.json"
    fields = with_both_rope_spellings(json.loads(file.read_text(encoding="utf-8")))
    fields.pop("_name_or_path", None)
    fields["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(model: nn.Module, folder: Path, dtype: torch.dtype, changed: Mapping[str, Tensor]) -> None:
    """Shard by shard, so that no second copy of the model is held; weights that are in files one by one.

    changed: in place of the model's own, by name.
    """
    tensors, away = {**_tensors(model), **changed}, offloaded(model)
    sizes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()} if away else tensors
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        if away is not None:
            entries = {name: _entry(tensors[name], away, dtype) for name in names}
            write_tensors(folder / file, entries, {"format": "pt"})
            continue
        shard = {
            name: tensors[name]
            .detach()
            .to(device="cpu", dtype=dtype if tensors[name].is_floating_point() else None)
            .contiguous()
            for name in names
        }
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _entry(tensor: Tensor, away: OffloadedWeights, dtype: torch.dtype) -> TensorEntry:
    kept = dtype if tensor.is_floating_point() else tensor.dtype
    return TensorEntry(dtype=kept, shape=tuple(tensor.shape), make=lambda: away.value(tensor).detach().to(kept))


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


def _write_records(parts: CheckpointParts, folder: Path) -> None:
    card = model_card(parts.manifest, parts.structure.base_model_type)
    (folder / "README.md").write_text(card, encoding="utf-8")
    records = folder / "saap"
    records.mkdir()
    (records / "manifest.json").write_text(parts.manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    write_plan(records / "plan.json", parts.plan, parts.graph)
    if parts.scores is not None:
        write_scores(records / "scores.safetensors", parts.scores)
