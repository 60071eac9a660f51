"""The settings of a run: one place for names, defaults and their reasons."""

from __future__ import annotations

from enum import StrEnum


class Importance(StrEnum):
    """Which score orders the units of a module."""

    VECTOR = "vector"
    ELEMENT1 = "element1"
    ELEMENT2 = "element2"
    MIXED = "mixed"
    FUSED = "fused"


class ElementOrder(StrEnum):
    """Which terms of the Taylor expansion the element-wise score keeps."""

    FIRST = "1"
    SECOND = "2"
    MIXED = "mixed"


class Aggregation(StrEnum):
    """How the scores of a unit's members become one."""

    SUM = "sum"
    PROD = "prod"
    MAX = "max"
    LAST = "last"


class FusionScope(StrEnum):
    """Which units share one pair of uncertainties in the fusion."""

    GLOBAL = "global"
    ROLE = "role"
    LAYER = "layer"
    LAYER_ROLE = "layer-role"


class Strategy(StrEnum):
    """How the search decides what each module gives."""

    ADAPTIVE = "adaptive"
    IMPORTANCE = "importance"
    UNIFORM = "uniform"
    VOLATILITY_Z = "volatility-z"
    VOLATILITY_CV = "volatility-cv"


class Effort(StrEnum):
    """How much time search and restoration may take."""

    FAST = "fast"
    DEFAULT = "default"
    BEST = "best"
