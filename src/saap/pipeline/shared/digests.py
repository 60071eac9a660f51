"""Digests of the inputs of a run: weights, and the files in its settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saap.core.records import digest_of
from saap.models.loading.references import ResolvedModel


def named_files(values: Any) -> dict[str, str]:
    """Digests of the files and folders in settings, to detect changed texts."""
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list):
        return {name: digest for value in values for name, digest in named_files(value).items()}
    if isinstance(values, str) and values and len(values) < 4096 and "\0" not in values and Path(values).exists():
        return {values: tree_digest(Path(values))}
    return {}


def tree_digest(path: Path) -> str:
    """sha256 over the names and contents of a file, or of all files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def weights_digest(resolved: ResolvedModel) -> str:
    """sha256 over the names and contents of the model's weight files."""
    names = (
        [resolved.gguf_file] if resolved.gguf_file else sorted(f.name for f in resolved.folder.glob("*.safetensors"))
    )
    return digest_of([[name, tree_digest(resolved.folder / name)] for name in names])


def model_digest(resolved: ResolvedModel) -> str:
    """sha256 over the weights of a model, its configuration and its tokenizer."""
    small = sorted(resolved.folder.glob("*.json")) if resolved.gguf_file is None else []
    return digest_of([weights_digest(resolved), [[file.name, tree_digest(file)] for file in small]])
