"""Atomic writing of a Hugging Face checkpoint folder in either layout."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import AutoConfig

from saap.core.errors import OutputError
from saap.core.manifest import RunManifest
from saap.core.records import ImportanceScores, Layout, ModelGraph, StructurePlan
from saap.core.storage import write_plan, write_scores, write_whole
from saap.core.vocabulary import VOCABULARY, VocabularyMap, write_vocabulary
from saap.export.model_card import model_card, opens_only_in_mlx, opens_with_code
from saap.export.placing import check_output, whole_folder
from saap.export.uniform_layout import stock_config
from saap.models.checkpoint import modeling_pruned
from saap.models.checkpoint.groupwise import PACKED_FILE, GroupwiseLinear, GroupwiseWeight, write_packed
from saap.models.checkpoint.modeling_pruned import MODEL_TYPE, pruned_classes
from saap.models.checkpoint.pruned_structure import MLX_LOADER, PrunedStructure, refused_by_vllm, state_structure
from saap.models.checkpoint.published_names import with_published_names
from saap.models.checkpoint.safetensor_files import INDEX_NAME, TensorEntry, tensors_once, write_tensors
from saap.models.loading.references import LEGAL_FILES
from saap.models.walk.offload import offloaded

SHARD_SIZE = "2GB"
# Image processor files of multimodal models.
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
                "chat_template.json")  # fmt: skip
# Fields of tokenizer_config.json about this machine.
_LOCAL_FIELDS = ("vocab_file", "is_local", "local_files_only")
FOLDER_FILES = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja", "*.model",
    "generation_config.json", *LEGAL_FILES,
)  # fmt: skip
"""Files of a folder besides weights and configuration that other programs read too."""
KEPT_RECORDS = ("plan.json", "scores.safetensors", VOCABULARY)
"""Files of the source's folder `saap` that are still valid for a tuned model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderParts:
    """Contents of any folder besides the weights.

    source_folder: of the model that this one was made from. vocabulary: which of its tokens are kept, if not all.
    """

    manifest: RunManifest
    tokenizer: Any | None = None
    source_folder: Path | None = None
    vocabulary: VocabularyMap | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointParts(FolderParts):
    """Contents of the folder of a pruned model besides the weights."""

    graph: ModelGraph
    plan: StructurePlan
    structure: PrunedStructure
    scores: ImportanceScores | None = None


def write_checkpoint(
    model: nn.Module, parts: CheckpointParts, out: Path, *, dtype: torch.dtype, overwrite: bool = False
) -> Path:
    """Write the pruned `model` (not changed) with weights in `dtype`, in the plan's layout. Returns `out`.

    Raises OutputError if `out` exists (and not `overwrite`), cannot be written or does not fit on the disk; LayoutError
    if the layout does not support the plan.
    """
    check_output(out, entry_bytes(stored_entries(model, dtype)), overwrite=overwrite)
    if parts.plan.layout is Layout.UNIFORM:
        config, changed = stock_config(model, parts.graph, parts.plan, parts.structure)
    else:
        config, changed = _adaptive_config(model, parts.structure), {}
    entries = stored_entries(model, dtype, changed)
    with _model_folder(out, model, config, dtype, entries, parts) as folder:
        write_plan(folder / "saap" / "plan.json", parts.plan, parts.graph)
        if parts.scores is not None:
            write_scores(folder / "saap" / "scores.safetensors", parts.scores)
    return out


def write_recovered(
    model: Any, parts: FolderParts, packed: Mapping[str, GroupwiseWeight], out: Path, *, dtype: torch.dtype,
    overwrite: bool = False, check: Callable[[Path], None],
) -> None:  # fmt: skip
    """Write the tuned `model` (adapters merged) atomically, without a second copy in memory.

    packed: weights by module path, empty for a model that was not quantised. check: opens the complete folder before it
    is moved to `out`, and raises an error to discard it.
    Raises OutputError if `out` exists (and not `overwrite`), cannot be written or does not fit on the disk.
    """
    entries = stored_entries(model, dtype)
    needed = entry_bytes(entries) + sum(weight.nbytes for weight in packed.values())
    check_output(out, needed, overwrite=overwrite)
    with _model_folder(out, model, model.config, dtype, entries, parts) as folder:
        if parts.source_folder is not None:
            copy_matching(parts.source_folder / "saap", folder / "saap", KEPT_RECORDS)
        if packed:
            write_packed(folder / "saap" / PACKED_FILE, packed)
        check(folder)


@contextmanager
def _model_folder(
    out: Path, model: nn.Module, config: Any, dtype: torch.dtype, entries: Mapping[str, TensorEntry],
    parts: FolderParts,
) -> Iterator[Path]:  # fmt: skip
    """A folder that transformers opens, to add records to; it is moved to `out` if the block succeeds."""
    with whole_folder(out) as folder:
        config.save_pretrained(folder)
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fields = with_both_rope_spellings(fields) | {"dtype": str(dtype).removeprefix("torch.")}
        aliases = getattr(config, "attribute_map", {})  # older versions and other programs know only these
        fields = {a: fields[n] for a, n in aliases.items() if "expert" in a and n in fields} | fields
        fields.pop("_name_or_path", None)
        if config.model_type == MODEL_TYPE:
            fields["model_file"] = MLX_LOADER.name
            for code in (Path(modeling_pruned.__file__), MLX_LOADER):
                shutil.copyfile(code, folder / code.name)
        else:  # any program may open it
            entries = with_published_names(model, entries)
        write_json(folder / "config.json", fields)
        write_shards(entries, folder)
        write_companions(model, parts, folder)
        write_records(folder, parts.manifest)
        if parts.vocabulary is not None:
            write_vocabulary(folder, parts.vocabulary)
        yield folder


def write_records(folder: Path, manifest: RunManifest, *, loading: str | None = None) -> None:
    """Write manifest and model card into a folder with its config.json. loading: how to open it, if not as usual."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    card = model_card(
        manifest, config.get("base_model_type", config["model_type"]), folder, loading=loading,
        refused_by_vllm=refused_by_vllm(config), library="mlx" if opens_only_in_mlx(config) else "transformers",
        own_code=opens_with_code(config),
    )  # fmt: skip
    write_whole(folder / "saap" / "manifest.json", (manifest.model_dump_json(indent=2) + "\n").encode())
    write_whole(folder / "README.md", card.encode())


def stored_entries(
    model: nn.Module, dtype: torch.dtype, changed: Mapping[str, Tensor] | None = None
) -> dict[str, TensorEntry]:
    """Tensors of a plain checkpoint of `model` by name, each created when it is written.

    Tied tensors have only their first name: the loader ties them again. Packed layers are written as full weights under
    the original name. Buffers keep their type, as few values may need many digits (corrections of a router). changed:
    replacements of the model's own tensors, by name.
    """
    away = offloaded(model)

    def value(tensor: Tensor, kept: torch.dtype) -> Tensor:
        return (tensor if away is None else away.value(tensor)).detach().to(kept)

    def entry(tensor: Tensor, weight: bool = True) -> TensorEntry:
        kept = dtype if weight and tensor.is_floating_point() else tensor.dtype
        return TensorEntry(dtype=kept, shape=tuple(tensor.shape), make=partial(value, tensor, kept))

    entries: dict[str, TensorEntry] = {}
    packed = {path: module for path, module in model.named_modules() if isinstance(module, GroupwiseLinear)}
    for name, tensor in tensors_once(model).items():
        path, _, attribute = name.rpartition(".")
        if path in packed and attribute in ("packed", "scale", "zero"):
            layer = packed[path]
            shape = layer.quantised.shape[:: -1 if layer.transposed else 1]
            entries[f"{path}.weight"] = TensorEntry(dtype=dtype, shape=shape, make=partial(layer.stored_weight, dtype))
        else:
            entries[name] = entry(tensor, isinstance(tensor, nn.Parameter))
    return entries | {name: entry(tensor) for name, tensor in (changed or {}).items()}


def entry_bytes(entries: Mapping[str, TensorEntry]) -> int:
    """Bytes of all of them as written."""
    return sum(torch.Size(entry.shape).numel() * entry.dtype.itemsize for entry in entries.values())


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file of a model folder as transformers does."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_matching(source: Path, folder: Path, patterns: Iterable[str]) -> None:
    """Copy the files of one folder whose names match into another."""
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _adaptive_config(model: nn.Module, structure: PrunedStructure) -> Any:
    """The model's configuration marked as pruned, with the sizes that it cannot express in `pruned_structure`.

    Raises OutputError if transformers' auto classes do not know the model, so nothing could open the folder.
    """
    own: Any = getattr(model, "config", None)
    try:
        config_class, _ = pruned_classes(structure.base_model_type)
    except ValueError:
        raise OutputError(
            f"A model of class {type(model).__name__} cannot be opened from a folder",
            "Register its classes with AutoConfig and AutoModelForCausalLM, or prune without -o",
        ) from None
    config = config_class.from_dict({**own.to_dict(), "model_type": MODEL_TYPE})
    state_structure(config, structure)
    return config


def with_both_rope_spellings(fields: dict[str, Any]) -> dict[str, Any]:
    """config.json with the rotary embedding as `rope_parameters` and also as `rope_theta` and `rope_scaling`.

    Older consumers know only the latter. fields: of a configuration, possibly with that of its text model inside;
    without the new spelling they are returned unchanged.
    """
    if isinstance(inner := fields.get("text_config"), dict):
        fields = {**fields, "text_config": with_both_rope_spellings(inner)}
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        return fields
    full, local = rope.get("full_attention"), rope.get("sliding_attention")  # where each kind of layers has its own
    rope = full if isinstance(full, dict) else rope
    old = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in old}
    if rope.get("rope_type", "default") != "default" and (rope is not full or _reads_both(fields, scaling)):
        old["rope_scaling"] = scaling
    if isinstance(local, dict) and "rope_theta" in local:
        old["rope_local_base_freq"] = local["rope_theta"]
    return {**old, **fields}


def _reads_both(fields: Mapping[str, Any], scaling: Mapping[str, Any]) -> bool:
    """Whether the family's configuration keeps `rope_parameters` by kind of layer if `rope_scaling` is given too."""
    kind, given = fields.get("base_model_type", fields.get("model_type")), dict(fields)
    given.pop("model_type", None)
    try:
        plain = AutoConfig.for_model(kind, **copy.deepcopy(given))
        both = AutoConfig.for_model(kind, **copy.deepcopy({**given, "rope_scaling": scaling}))
    except Exception:  # of an unknown family, or one that takes the scaling for all kinds of layers
        return False
    same: bool = plain.rope_parameters == both.rope_parameters
    return same


def write_shards(entries: Mapping[str, TensorEntry], folder: Path, program: str = "pt") -> None:
    """Write tensor by tensor, without a second copy of the model in memory. program: that the names are of."""
    sizes = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: entries[name] for name in names}, {"format": program})
    if split.is_sharded:
        write_json(folder / INDEX_NAME, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def write_companions(model: nn.Module, parts: FolderParts, folder: Path) -> None:
    """Write generation settings, tokenizer, and the source's image settings, licence files and own code."""
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")
    if parts.tokenizer is not None:
        write_tokenizer(parts.tokenizer, folder)
    if parts.source_folder is not None:
        copy_matching(parts.source_folder, folder, (*LEGAL_FILES, *IMAGE_FILES))
        config: Any = model.config
        if getattr(config, "auto_map", None) and config.model_type != MODEL_TYPE:
            copy_matching(parts.source_folder, folder, ("*.py",))


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer so that every supported version of transformers opens it.

    `tokenizer_class` is always a class of transformers, unless the tokenizer needs code of its own.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    fields = json.loads(file.read_text(encoding="utf-8"))
    if fields.get("tokenizer_class") == "TokenizersBackend":  # all of it is in tokenizer.json
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that all versions of transformers support
    if isinstance(fields.get("extra_special_tokens"), list):  # version 4 only accepts a mapping under this name
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    for name in _LOCAL_FIELDS:
        fields.pop(name, None)
    file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
