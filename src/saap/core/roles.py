"""What is pruned, and how sizes may differ: words that need no numpy, so that the command line answers at once."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """What a coupled group does in the model."""

    FFN = "ffn"
    ATTENTION = "attention"
    QUERY = "query"
    EXPERT = "expert"
    HIDDEN = "hidden"

    @property
    def of_channels(self) -> bool:
        """Whether its units are single channels, whose number is aligned."""
        return self in (Role.FFN, Role.HIDDEN)


class Layout(StrEnum):
    """`adaptive`: each layer its own sizes. `uniform`: the same sizes everywhere, so the stock class can load it."""

    ADAPTIVE = "adaptive"
    UNIFORM = "uniform"
