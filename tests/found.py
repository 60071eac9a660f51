"""Structures that were found once, for all tests of a session and for the processes that they start."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

FOLDER = "SAAP_TESTS_FOUND"
"""Variable of the environment: where the session keeps what it has found."""
_FOUND: dict[Any, Any] = {}


def share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Discover models of the same modules, shapes and configuration once."""
    module = import_module("saap.discovery.discover")
    monkeypatch.setattr(module, "of_structure", remembering(module.of_structure))


def remembering(stock: Callable[..., Any]) -> Callable[..., Any]:
    def of_structure(model: Any, ref: Any, *, finer_heads: bool) -> Any:
        owner: dict[int, str] = {}  # of tensors that are tied
        tensors = [
            (name, owner.setdefault(id(tensor), name), tensor.shape, tensor.dtype, str(tensor.device))
            for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        ]
        kinds = tuple(type(module) for module in model.modules())
        key = (repr(getattr(model, "config", None)), repr(model), kinds, tuple(tensors), finer_heads)
        if key not in _FOUND:
            _FOUND[key] = _kept(key, kinds) or stock(model, ref, finer_heads=finer_heads)
            _keep(key, kinds)
        return replace(_FOUND[key], model=ref)

    return of_structure


def _file(key: Any, kinds: tuple[type, ...]) -> Path | None:
    """Where a graph is kept; not of classes that tests make, since two of them may have one name."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
    if FOLDER not in os.environ or not all(name.startswith(("torch.", "transformers.models.")) for name in names):
        return None
    text = repr((*key[:2], names, *key[3:]))
    return Path(os.environ[FOLDER]) / hashlib.sha256(text.encode()).hexdigest()


def _kept(key: Any, kinds: tuple[type, ...]) -> Any:
    file = _file(key, kinds)
    return pickle.loads(file.read_bytes()) if file is not None and file.exists() else None


def _keep(key: Any, kinds: tuple[type, ...]) -> None:
    file = _file(key, kinds)
    if file is not None and not file.exists():
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(pickle.dumps(_FOUND[key]))
        part.rename(file)
