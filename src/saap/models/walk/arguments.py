"""Arguments of forwards: those that keep a model free of a cache, and tensors with one entry per unit (ALiBi)."""

from __future__ import annotations

import inspect

from torch import Tensor, nn


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Keywords that keep a forward on token ids free of a key-value cache.

    Some forwards of transformers hand `use_cache` on among other keywords, without a parameter of that name.
    """
    named = inspect.signature(model.forward).parameters
    others = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in named.values())
    handed_on = others and hasattr(getattr(model, "config", None), "use_cache")
    return {"use_cache": False} if "use_cache" in named or handed_on else {}


def unit_axis(value: object, *, samples: int, units: int) -> tuple[int, bool] | None:
    """(axis, whether it runs over samples too) of the axis of `value` that has one entry per unit; None if none has.

    samples: of the batch that the value belongs to, not equal to `units`.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 3:
        return None
    if value.shape[0] in (units, samples * units):
        return 0, value.shape[0] != units
    return (1, False) if value.ndim == 4 and value.shape[1] == units else None
