"""The rows of the book, in the order in which they are read."""

from __future__ import annotations

from resultsbook.row import Row
from resultsbook.rows import (
    ablation,
    boundaries,
    break_conditions,
    calibration,
    estimation_cost,
    families,
    generation,
    group_sizes,
    importance,
    multilingual,
    multimodal,
    perplexity,
    speed,
)

ROWS: tuple[Row, ...] = (
    perplexity.ROW,
    importance.ROW,
    break_conditions.ROW,
    ablation.ROW,
    calibration.ROW,
    families.ROW,
    multilingual.ROW,
    multimodal.ROW,
    group_sizes.ROW,
    boundaries.ROW,
    generation.ROW,
    estimation_cost.ROW,
    speed.ROW,
)
