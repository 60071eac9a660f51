"""Settings of all tests, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
from hypothesis import settings

# How long an example takes says nothing about it on a busy machine.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")

_FOUND: dict[Any, Any] = {}
OWN_DISCOVERY = ("tests/discovery", "tests/conformance", "tests/real")


@pytest.fixture(autouse=True)
def structures_are_found_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the same modules, shapes and configuration are discovered once, except in tests of discovery."""
    if not any(folder in request.node.path.as_posix() for folder in OWN_DISCOVERY):
        module = import_module("saap.discovery.discover")
        monkeypatch.setattr(module, "of_structure", _remembering(module.of_structure))


def _remembering(stock: Callable[..., Any]) -> Callable[..., Any]:
    def of_structure(model: Any, ref: Any, *, finer_heads: bool) -> Any:
        owner: dict[int, str] = {}  # of tensors that are tied
        tensors = [
            (name, owner.setdefault(id(tensor), name), tensor.shape, tensor.dtype, str(tensor.device))
            for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        ]
        kinds = tuple(type(module) for module in model.modules())
        key = (repr(getattr(model, "config", None)), repr(model), kinds, tuple(tensors), finer_heads)
        if key not in _FOUND:
            _FOUND[key] = stock(model, ref, finer_heads=finer_heads)
        return replace(_FOUND[key], model=ref)

    return of_structure
