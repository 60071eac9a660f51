"""Structures and tasks that were found once, for all tests of a session and for the processes that they start."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FOLDER = "SAAP_TESTS_FOUND"
"""Variable of the environment: where the session keeps what it has found."""
_FOUND: dict[Any, Any] = {}


def share(setting: Callable[[Any, str, Any], object]) -> None:
    """Discover models of the same modules, shapes and configuration once. setting: as in `tests.texts`."""
    module = import_module("saap.discovery.discover")
    setting(module, "of_structure", remembering(module.of_structure))
    zero_shot = import_module("saap.evaluation.zero_shot")
    setting(zero_shot, "_task_manager", indexing_once(zero_shot._task_manager))


def indexing_once(stock: Callable[[], Any]) -> Callable[[], Any]:
    def task_manager() -> Any:
        if find_spec("lm_eval") is not None:
            index_tasks_once()
        return stock()

    return task_manager


@cache
def index_tasks_once() -> None:
    """The harness reads 14,000 files to know its tasks: one process of a session does."""
    module = import_module("lm_eval.tasks._index")
    module.TaskIndex.build = staticmethod(_indexing(module.TaskIndex.build, Path(module.__file__ or "").parent))


def _indexing(stock: Callable[..., dict[str, Any]], own: Path) -> Callable[..., dict[str, Any]]:
    def build(paths: Iterable[Path], **options: Any) -> dict[str, Any]:
        tasks: dict[str, Any] = {}
        for path in paths:
            file = Path(os.environ[FOLDER]) / "tasks" if path == own and FOLDER in os.environ and not options else None
            if file is not None and file.exists():
                tasks |= pickle.loads(file.read_bytes())
                continue
            made = stock([path], **options)
            tasks |= made
            if file is not None:
                write(file, pickle.dumps(made))
        return tasks

    return build


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
    if FOLDER not in os.environ or not all(name.startswith(("torch.", "transformers.")) for name in names):
        return None
    text = repr((*key[:2], names, *key[3:]))
    return Path(os.environ[FOLDER]) / hashlib.sha256(text.encode()).hexdigest()


def _kept(key: Any, kinds: tuple[type, ...]) -> Any:
    file = _file(key, kinds)
    return pickle.loads(file.read_bytes()) if file is not None and file.exists() else None


def _keep(key: Any, kinds: tuple[type, ...]) -> None:
    file = _file(key, kinds)
    if file is not None and not file.exists():
        write(file, pickle.dumps(_FOUND[key]))


def write(file: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    part = file.with_suffix(f".{os.getpid()}")
    part.write_bytes(content)
    part.rename(file)
