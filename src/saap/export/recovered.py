"""The folder of a tuned model: plain weights that open everywhere, and the packed integers beside them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saap.core.manifest import RunManifest
from saap.export.huggingface import entry_bytes, model_folder, stored_entries, write_records
from saap.export.placing import check_output
from saap.models.checkpoint.groupwise import PACKED_FILE, GroupwiseWeight, write_packed

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


def write_recovered(
    model: Any, parts: RecoveredParts, out: Path, *, dtype: torch.dtype, overwrite: bool = False
) -> None:
    """Write the tuned `model` (adapters merged) whole or not at all; no second copy of it is held.

    Raises OutputError if `out` exists (and not `overwrite`), cannot be written or does not fit on the disk.
    """
    entries = stored_entries(model, dtype)
    needed = entry_bytes(entries) + sum(weight.nbytes for weight in parts.packed.values())
    check_output(out, needed, overwrite=overwrite)
    with model_folder(out, model, model.config, dtype, entries, parts.tokenizer, parts.source_folder) as folder:
        write_records(folder, parts.manifest, parts.base_model_type)
        for name in KEPT_RECORDS:
            if parts.source_folder is not None and (parts.source_folder / "saap" / name).is_file():
                shutil.copyfile(parts.source_folder / "saap" / name, folder / "saap" / name)
        if parts.packed:
            write_packed(folder / "saap" / PACKED_FILE, parts.packed)
