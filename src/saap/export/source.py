"""Input and output of an export: the model with its files, and the written file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict

from saap.core.errors import ExportError
from saap.core.manifest import RunManifest, read_manifest
from saap.models.checkpoint.safetensor_files import Shape, StoredTensors, weight_files
from saap.models.loading.pretrained import load_config, load_model, load_tokenizer
from saap.models.loading.references import ResolvedModel, resolve_model


class Progress(Protocol):
    """Receives the progress of an export."""

    def stage(self, title: str) -> None:
        """A new stage begins."""

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` steps of the current stage are finished."""


class Exported(BaseModel):
    """A written export. notes: lines for the user, with how to open it."""

    model_config = ConfigDict(frozen=True)

    path: Path
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON-able data, without the notes."""
        return self.model_dump(mode="json", exclude={"notes"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSource:
    """The model to export; weights are read lazily.

    config: of transformers, also for an adaptive checkpoint. manifest: of a folder written by saap. loaded: the model
    itself if it is already in memory.
    """

    config: Any
    tensors: StoredTensors
    resolved: ResolvedModel
    tokenizer: Any | None = None
    manifest: RunManifest | None = None
    loaded: Any | None = None

    def model(self) -> Any:
        """The whole model in float32, on the CPU."""
        return self.loaded or load_model(self.resolved, device=torch.device("cpu"), dtype=torch.float32)


def open_source(source: str | Path, revision: str | None = None) -> ExportSource:
    """Open the model specified by a user; only quantised weights are read as a whole. Raises SaapError."""
    resolved = resolve_model(source, revision=revision)
    loaded, manifest = None, None if resolved.gguf_file is not None else read_manifest(resolved.folder)
    if resolved.gguf_file is not None or resolved.quantisation is not None:
        loaded = load_model(resolved, device=torch.device("cpu"), dtype=torch.float32)
        config, tensors = loaded.config, StoredTensors.of_model(loaded)
    else:
        tensors = StoredTensors.in_files(weight_files(resolved.folder))
        if "embed_tokens.weight" in tensors.shapes:
            raise ExportError(
                f"{resolved.source} was saved without its head: its tensors have no prefix `model.`",
                "Open it with AutoModelForCausalLM, save it with save_pretrained, and give that folder",
            )
        config = load_config(resolved)
    return ExportSource(
        config=config, tensors=tensors, resolved=resolved, tokenizer=load_tokenizer(resolved), manifest=manifest,
        loaded=loaded,
    )  # fmt: skip


class LayerSizes(NamedTuple):
    """FFN channels, heads and KV heads of one layer."""

    ffn: int
    heads: int
    kv_heads: int


def head_size(config: Any) -> int:
    """Channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_sizes(config: Any, shapes: Mapping[str, Shape]) -> list[LayerSizes]:
    """Layer sizes of a LLaMA-like model from its tensor shapes; 0 for a missing part."""
    found = []
    for layer in range(config.num_hidden_layers):
        names = (f"model.layers.{layer}.{path}_proj.weight" for path in ("mlp.gate", "self_attn.q", "self_attn.k"))
        ffn, query, key = (shapes.get(name, (0,))[0] for name in names)
        found.append(LayerSizes(ffn, query // head_size(config), key // head_size(config)))
    return found
