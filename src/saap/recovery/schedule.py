"""How far a training is, and how fast it learns there (pure)."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_SHARE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What ends a training, whichever comes first; None: no such limit."""

    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def share(self, steps: int, tokens: int, seconds: float) -> float:
        """How much of the way lies behind, 1 at the end and beyond."""
        shares = [
            done / limit
            for done, limit in ((steps, self.steps), (tokens, self.tokens), (seconds, self.seconds))
            if limit is not None
        ]
        return min(1.0, max(shares, default=0.0))


def learning_rate(peak: float, share: float, warm_up: float) -> float:
    """Linear from 0 to `peak` over the first `warm_up` of the way, then half a cosine down to 0.

    share: of the way, 0 to 1. Source: SGDR (Loshchilov & Hutter 2017), one cycle.
    """
    share = max(share, LEAST_SHARE)
    if share < warm_up:
        return peak * share / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (share - warm_up) / (1 - warm_up)))
