"""Tensors that a module is given from outside with one entry per unit, such as ALiBi's slopes per head."""

from __future__ import annotations

from torch import Tensor


def unit_axis(value: object, *, samples: int, units: int) -> tuple[int, bool] | None:
    """(axis, whether it runs over samples too) of the axis of `value` that has one entry per unit; None if none has.

    samples: of the batch that the value belongs to, not equal to `units`.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 3:
        return None
    if value.shape[0] in (units, samples * units):
        return 0, value.shape[0] != units
    return (1, False) if value.ndim == 4 and value.shape[1] == units else None
