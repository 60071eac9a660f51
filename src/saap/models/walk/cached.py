"""A transformers model that reads token by token, with its cache of keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class CachedModel:
    """One sequence in the memory of a model. The argument for the cache has the name that its version knows."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._cache: Any = None
        known = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._name = "cache" if "cache" in known else "past_key_values"

    def forget(self) -> None:
        """Start a new sequence."""
        self._cache = None

    @torch.no_grad()
    def feed(self, ids: Sequence[int]) -> Tensor:
        """Read further tokens. Returns the logits (vocabulary,) of what follows them."""
        inputs = torch.tensor([list(ids)], device=self._device)
        output = self._model(inputs, **{self._name: self._cache}, use_cache=True, **self._options)
        self._cache = output[self._name]
        logits: Tensor = output.logits[0, -1]
        return logits
