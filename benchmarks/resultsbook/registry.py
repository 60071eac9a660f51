"""The rows of the book, in the order in which they are read."""

from __future__ import annotations

from resultsbook.row import Row
from resultsbook.rows import break_conditions, estimation_cost, group_sizes, importance, perplexity, speed

ROWS: tuple[Row, ...] = (
    perplexity.ROW,
    importance.ROW,
    break_conditions.ROW,
    group_sizes.ROW,
    estimation_cost.ROW,
    speed.ROW,
)
