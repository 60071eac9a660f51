"""What an export reads and gives: the model with its files, and what was written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from transformers import AutoConfig

from saap.core.errors import ModelError
from saap.core.manifest import RunManifest, read_manifest
from saap.models.checkpoint.safetensor_files import ModelTensors, StoredTensors, TensorReader, weight_files
from saap.models.loading.pretrained import load_model, load_tokenizer, quiet_transformers, register_pruned_models
from saap.models.loading.references import ResolvedModel, resolve_model


class Progress(Protocol):
    """Is told what an export does."""

    def stage(self, title: str) -> None:
        """A new stage begins."""

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` steps of the current stage are finished."""


class Exported(BaseModel):
    """What was written. notes: lines that say so to the user, and how it is opened."""

    model_config = ConfigDict(frozen=True)

    path: Path
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON-able data, without the notes."""
        return self.model_dump(mode="json", exclude={"notes"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSource:
    """The model to export, whose weights are read when they are asked for.

    config: of transformers, also of an adaptive checkpoint. manifest: of a folder that saap has written. loaded: the
    model itself, where it is in memory already.
    """

    config: Any
    tensors: StoredTensors
    resolved: ResolvedModel
    tokenizer: Any | None = None
    manifest: RunManifest | None = None
    loaded: Any | None = None

    @property
    def model_type(self) -> str:
        """The type of the dense model, as transformers names it."""
        return str(getattr(self.config, "base_model_type", None) or self.config.model_type)

    def model(self) -> Any:
        """The whole model in float32, on the CPU."""
        if self.loaded is not None:
            return self.loaded
        return load_model(self.resolved, device=torch.device("cpu"), dtype=torch.float32)


def open_source(source: str | Path, revision: str | None = None) -> ExportSource:
    """Open the model that a user names; only a GGUF file is read whole. Raises ModelError."""
    resolved = resolve_model(source, revision=revision)
    if resolved.gguf_file is not None:
        model = load_model(resolved, device=torch.device("cpu"), dtype=torch.float32)
        opened = ExportSource(config=model.config, tensors=ModelTensors(model), resolved=resolved, loaded=model)
    else:
        files = TensorReader(weight_files(resolved.folder))
        manifest = read_manifest(resolved.folder)
        opened = ExportSource(config=_config(resolved), tensors=files, resolved=resolved, manifest=manifest)
    return replace(opened, tokenizer=load_tokenizer(resolved))


def _config(resolved: ResolvedModel) -> Any:
    register_pruned_models()
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(resolved.folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{resolved.folder} has no usable config.json ({error})", "Check the file") from error
