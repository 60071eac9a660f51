"""Export to MLX-LM: a folder for its commands, with the quantised weights of `saap recover` as they are."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saap.core.errors import ExportError, first_line, listed
from saap.core.manifest import Change, RunManifest
from saap.export.huggingface import (
    FOLDER_FILES,
    KEPT_RECORDS,
    copy_matching,
    entry_bytes,
    with_both_rope_spellings,
    write_json,
    write_records,
    write_shards,
)
from saap.export.model_card import mlx_line
from saap.export.placing import check_output, whole_folder
from saap.export.source import Exported, ExportSource, Progress
from saap.models.checkpoint.groupwise import PACKED_FILE, GroupwiseWeight, read_packed
from saap.models.checkpoint.modeling_pruned import MODEL_TYPE
from saap.models.checkpoint.pruned_structure import MLX_LOADER
from saap.models.checkpoint.safetensor_files import Shape, StoredTensors, TensorEntry, weight_files
from saap.models.loading.references import read_config
from saap.settings.export import ExportRequest

GROUP_SIZES = (32, 64, 128)
OLDEST = (0, 31)
"""Version of mlx-lm that first reads `model_file`."""
_ATTENTION_KINDS = ("full_attention", "sliding_attention")
_ROWS_AT_ONCE = 1024
_REMEDY = "Use the folder with transformers"
_LOADING = """With MLX-LM (`pip install mlx-lm`, 0.31 or newer):

```
{generate}
mlx_lm.server --model PATH{option}
```"""


class MlxExport(Exported):
    """A written folder.

    packed_matrices: number copied from the integers of `saap recover`. checked: version of mlx-lm that has a place for
    every tensor, None where it is not installed.
    """

    bytes: int
    packed_matrices: int = 0
    checked: str | None = None


def write(source: ExportSource, out: Path, request: ExportRequest, *, overwrite: bool, progress: Progress) -> MlxExport:
    """Write the folder atomically, one tensor at a time.

    request.verify: check with mlx-lm, where it is installed, that it knows every tensor. Raises ExportError with the
    modules before anything is written if MLX-LM cannot express the model, OutputError.
    """
    if source.resolved.gguf_file is not None:
        raise ExportError(
            f"{source.resolved.source} is a GGUF file without safetensors", "Prune it first, then export the folder"
        )
    folder, shapes = source.resolved.folder, source.tensors.shapes
    packed = read_packed(folder) if (folder / "saap" / PACKED_FILE).is_file() else {}
    stacked = any(name.endswith(".experts.gate_up_proj") for name in shapes)  # only the loader splits all experts
    needs_loader = source.config.model_type == MODEL_TYPE or stacked
    config = read_config(folder)
    if source.resolved.quantisation is not None:
        config.pop("quantization_config")  # the weights are written dequantised
    fields = mlx_fields(config, packed, needs_loader=needs_loader)
    check_structure(fields, shapes, packed)
    checked = check_in_mlx(fields, shapes) if request.verify else None
    entries = mlx_entries(source, packed)
    check_output(out, entry_bytes(entries), overwrite=overwrite)
    loading = _LOADING.format(
        generate=mlx_line("PATH", needs_loader=needs_loader), option=" --trust-remote-code" if needs_loader else ""
    )
    with whole_folder(out) as part:
        progress.stage(f"write {out.name}")
        write_shards(entries, part, "mlx")
        copy_matching(folder, part, FOLDER_FILES)
        write_json(part / "config.json", fields)
        if needs_loader:
            shutil.copyfile(MLX_LOADER, part / MLX_LOADER.name)
        if source.manifest is not None:
            write_records(part, _own_manifest(source.manifest, packed, entry_bytes(entries)), loading=loading)
            copy_matching(folder / "saap", part / "saap", KEPT_RECORDS)
    done = MlxExport(path=out, bytes=entry_bytes(entries), packed_matrices=len(packed), checked=checked)
    exact = f"{done.packed_matrices} matrices have exactly the integers and scales of `saap recover`"
    unchecked = "not checked: mlx-lm is not installed here" if request.verify else "not checked in mlx-lm"
    notes = (
        f"{out}: {done.bytes / 1e6:,.1f} MB",
        *((exact,) if packed else ()),
        unchecked if checked is None else f"mlx-lm {checked} has a place for every tensor",
        "run it with:",
        f"  {mlx_line(out, needs_loader=needs_loader)}",
    )
    return done.model_copy(update={"notes": notes})


def _own_manifest(manifest: RunManifest, packed: Mapping[str, GroupwiseWeight], written: int) -> RunManifest:
    """The manifest of the exported folder: its own bytes, and not which programs opened the one it is made from."""
    changes: dict[str, Any] = {"opened": ()}
    if packed:
        bits = next(iter(packed.values())).bits
        changes["dtype"] = f"{manifest.dtype}; the pruned ones mostly in {bits} bits"
        changes["bytes"] = Change(before=manifest.bytes.before, after=written)
    return manifest.model_copy(update=changes)


def mlx_fields(
    config: Mapping[str, Any], packed: Mapping[str, GroupwiseWeight], *, needs_loader: bool
) -> dict[str, Any]:
    """config.json for MLX-LM: no code for transformers, but that of MLX-LM and the quantisation.

    config: of the folder. packed: weights by module path.
    """
    fields = with_both_rope_spellings({name: value for name, value in config.items() if name != "auto_map"})
    if needs_loader:
        fields["model_file"] = MLX_LOADER.name
    if packed:
        weight = next(iter(packed.values()))
        layout = {"group_size": weight.group_size, "bits": weight.bits}
        fields |= {"quantization": layout, "quantization_config": layout}
    return fields


def check_structure(
    fields: Mapping[str, Any], shapes: Mapping[str, Shape], packed: Mapping[str, GroupwiseWeight]
) -> None:
    """Raise ExportError for what MLX-LM cannot express, whatever its version.

    fields: of config.json. shapes: of the stored tensors. packed: weights by module path.
    """
    sizes = sorted({weight.group_size for weight in packed.values()} - set(GROUP_SIZES))
    if sizes:
        raise ExportError(
            f"MLX has no groups of {listed([str(size) for size in sizes], 4)} weights",
            f"Run `saap recover` with --group-size {' or '.join(map(str, GROUP_SIZES))}",
        )
    layouts = {(weight.bits, weight.group_size) for weight in packed.values()}
    transposed = [path for path, weight in packed.items() if shapes.get(f"{path}.weight") != weight.shape]
    sliced = list((fields.get("pruned_structure") or {}).get("sliced_arguments", {}))
    kinds = dict.fromkeys(kind for kind in fields.get("layer_types") or () if kind not in _ATTENTION_KINDS)
    for faults, problem in (
        (sliced, "MLX-LM cannot cut the arguments with one entry per head of {}"),
        (list(kinds), "MLX-LM renames the weights of layers of the kind {}, which saap does not follow"),
        (transposed, "MLX has no quantised weights that are stored transposed ({})"),
        ([str(pair) for pair in sorted(layouts)] if len(layouts) > 1 else [], "The layers have different layouts {}"),
    ):
        if faults:
            raise ExportError(problem.format(listed(faults, 6)), _REMEDY)


def check_in_mlx(fields: Mapping[str, Any], shapes: Mapping[str, Shape]) -> str | None:
    """Whether the installed mlx-lm has a place for every tensor, without computing anything.

    fields: of config.json. shapes: of the tensors before quantisation. Returns the version of mlx-lm; None if it or MLX
    is not installed, as on Linux mlx-lm comes without MLX, and MLX without a backend. Raises ExportError if mlx-lm is
    too old, does not know the family, or cannot express the model.
    """
    if any(importlib.util.find_spec(name) is None for name in ("mlx_lm", "mlx")):
        return None
    found = version("mlx-lm")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ExportError(f"mlx-lm {found} opens no pruned models", f"Install mlx-lm {needed} or newer")
    try:
        import mlx.core
    except ImportError:
        return None
    from mlx.utils import tree_flatten

    from saap.models.checkpoint import mlx_pruned

    weights = {
        name: mlx.core.zeros(shape) for name, shape in shapes.items()
    }  # nothing is computed until a result is used
    fields = {**fields, "quantization": None}
    try:
        if "model_file" in fields:
            model = mlx_pruned.Model(mlx_pruned.ModelArgs(fields))
        else:
            model_class, arguments = mlx_pruned.stock_classes(fields)
            model = model_class(arguments.from_dict(fields))
        weights = getattr(model, "sanitize", dict)(weights)
        model(mlx.core.array([[0, 1]]))
    except (Exception, SystemExit) as error:  # the stock classes raise anything
        raise ExportError(f"mlx-lm {found} cannot express this model ({first_line(error)})", _REMEDY) from error
    places = {name: tuple(value.shape) for name, value in tree_flatten(model.parameters())}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if faults := [name for name in {**places, **given} if places.get(name) != given.get(name)]:
        raise ExportError(f"mlx-lm {found} has another shape or no place for {listed(faults, 6)}", _REMEDY)
    return found


def mlx_entries(source: ExportSource, packed: Mapping[str, GroupwiseWeight]) -> dict[str, TensorEntry]:
    """The tensors to write by name: as stored, or with packed weights all in one type that holds their scales."""
    tensors = source.tensors
    stored = _stored_dtypes(source)
    exact = torch.float32 if any(dtype == torch.float32 for dtype in stored.values()) else torch.float16
    entries: dict[str, TensorEntry] = {}
    for name, shape in tensors.shapes.items():
        path = name.removesuffix(".weight")
        if path != name and path in packed:
            weight = packed[path]
            rows, columns = weight.shape
            entries[name] = TensorEntry(
                dtype=torch.uint32, shape=(rows, columns * weight.bits // 32), make=partial(affine_codes, weight)
            )
            for part, numbers in (("scales", weight.scale), ("biases", weight.zero)):
                entries[f"{path}.{part}"] = TensorEntry(
                    dtype=exact, shape=tuple(numbers.shape), make=partial(numbers.to, exact)
                )
            continue
        dtype = exact if packed and stored[name].is_floating_point else stored[name]
        entries[name] = TensorEntry(dtype=dtype, shape=shape, make=partial(_read, source, name, dtype))
    return entries


def _stored_dtypes(source: ExportSource) -> dict[str, torch.dtype]:
    """The type of each tensor in the files; of weights that were quantised there, the type that they stand for."""
    stored = dict(source.tensors.dtypes)
    if source.resolved.quantisation is None:
        return stored
    in_files = StoredTensors.in_files(weight_files(source.resolved.folder)).dtypes
    for name, dtype in stored.items():
        known = in_files.get(name, source.resolved.dtype)
        if dtype.is_floating_point:
            stored[name] = known if known.is_floating_point and known.itemsize > 1 else source.resolved.dtype
    return stored


def _read(source: ExportSource, name: str, dtype: torch.dtype) -> Tensor:
    return source.tensors.read(name).to(dtype)


def affine_codes(weight: GroupwiseWeight) -> Tensor:
    """The integers as MLX packs them, (out, in * bits / 32) uint32: rows of bits, the lowest of the first code first.

    MLX's affine weight is scale * code + bias, with the zero point as bias.
    """
    shifts = torch.arange(8) * weight.bits
    rows = []
    for codes in torch.split(weight.codes(), _ROWS_AT_ONCE):
        words = (codes.reshape(len(codes), -1, 8).to(torch.int64) << shifts).sum(-1, keepdim=True)
        rows.append(words.view(torch.uint8)[..., : weight.bits].flatten(1))  # eight codes are as many bytes as bits
    return torch.cat(rows).view(torch.uint32)
