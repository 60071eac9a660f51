"""Digests of the inputs of a run: weights, and the files in its settings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saap.core.records import digest_of
from saap.data.texts import DATA_SETS, KINDS, MIXED
from saap.models.loading.references import ResolvedModel

_FILES = ("calibration", "plan", "data", "texts", "task_data", "prompts", "chat", "dense", "teacher")
"""Settings that may name files: other words may be names of files by chance."""

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""Names of the files of a model besides its weights: configuration, template, tokenizers, code."""


def named_files(settings: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files and folders that settings name, to detect changed texts and models."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= named_files(value)
        elif name in _FILES:
            several = value if isinstance(value, list | tuple) else [value]
            found |= {word: tree_digest(Path(word)) for word in map(str, several) if value and _is_there(word)}
    return found


def _is_there(word: str) -> bool:
    return word not in (MIXED, *KINDS, *DATA_SETS) and os.path.exists(word)  # noqa: PTH110 - a text is no error


def tree_digest(path: Path) -> str:
    """sha256 over the names and contents of a file, or of all files below a folder.

    Not of hidden files and compiled code, which other programs leave in folders that they open.
    """
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        inside = file.relative_to(path).parts
        if file.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in inside):
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
    """sha256 over the weights of a model, its configuration, its code, its tokenizer and the chat template."""
    patterns = _SMALL_FILES if resolved.gguf_file is None else ()
    small = sorted(file for pattern in patterns for file in resolved.folder.glob(pattern))
    return digest_of([weights_digest(resolved), [[file.name, tree_digest(file)] for file in small]])
