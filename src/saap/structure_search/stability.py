"""Fluctuation and stability of importance scores (pure functions of arrays).

SAAP states the idea, not the formulas: units whose importance fluctuates most over samples are unstable. The two
indicators below are our readings of it.
"""

from __future__ import annotations

import numpy as np

from saap.core.records import FloatArray


def standardised_fluctuation(variance: FloatArray) -> FloatArray:
    """Reading 1: fluctuation standardised inside its layer, A = (M - mean M) / std M; zeros if all are equal.

    variance: (units,), M over samples of the units of one module. Returns (units,).
    """
    spread = variance.std()
    if spread == 0:
        return np.zeros_like(variance)
    return np.asarray((variance - variance.mean()) / spread)


def relative_volatility(mean: FloatArray, variance: FloatArray) -> FloatArray:
    """Reading 2: coefficient of variation sqrt(M) / mean; 0 where a unit has neither mean nor variance.

    mean (not negative), variance: (units,) over samples. Returns (units,).
    """
    deviation = np.sqrt(np.maximum(variance, 0.0))
    return np.divide(deviation, mean, out=np.where(deviation > 0, np.inf, 0.0), where=mean > 0)
