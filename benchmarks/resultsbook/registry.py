"""The rows of the book, in the order in which they are read."""

from __future__ import annotations

from resultsbook.row import Row
from resultsbook.rows import estimation_cost, group_sizes, perplexity, speed

ROWS: tuple[Row, ...] = (perplexity.ROW, group_sizes.ROW, estimation_cost.ROW, speed.ROW)
