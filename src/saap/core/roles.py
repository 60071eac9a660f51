"""Roles and layouts. Imports no numpy, so that the command line starts fast."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """Role of a coupled group in the model."""

    FFN = "ffn"
    ATTENTION = "attention"
    QUERY = "query"
    EXPERT = "expert"
    HIDDEN = "hidden"

    @property
    def of_channels(self) -> bool:
        """Whether the units are single channels, whose number is aligned."""
        return self in (Role.FFN, Role.HIDDEN)


class Layout(StrEnum):
    """`adaptive`: each layer its own sizes. `uniform`: the same sizes everywhere, so the stock class can load it."""

    ADAPTIVE = "adaptive"
    UNIFORM = "uniform"
