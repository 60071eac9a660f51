"""The tables of a comparison of methods."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from saap.core.evaluation_records import Comparison, ComparisonRow
from saap.reporting.tables import Table, accuracy, number, percent, short


def merged_over_seeds(rows: Sequence[ComparisonRow]) -> Mapping[tuple[str, float, bool], list[ComparisonRow]]:
    """The rows of all seeds by method, ratio and reconstruction, in the order of their first row."""
    grouped: defaultdict[tuple[str, float, bool], list[ComparisonRow]] = defaultdict(list)
    for row in rows:
        grouped[row.method, row.ratio, row.restored].append(row)
    return grouped


def comparison_table(comparison: Comparison) -> Table:
    """All measurements by method, ratio and reconstruction; means over the seeds ± their deviation."""
    dense = comparison.dense
    groups = list(merged_over_seeds(comparison.rows).values())
    columns = [
        ["method", "dense", *(same[0].method for same in groups)],
        ["asked", "", *(f"{same[0].ratio:g}" for same in groups)],
        ["restored", "", *("yes" if same[0].restored else "no" for same in groups)],
        ["removed", "", *(f"{np.mean([row.pruning_ratio for row in same]):.1%}" for same in groups)],
        ["parameters", f"{dense.parameters:,}", *(f"{same[0].parameters:,}" for same in groups)],
    ]
    for text, of_dense in dense.perplexity.items():
        values = [_cell([row.perplexity[text].value for row in same], 2) for same in groups]
        columns.append([f"perplexity {short(text)}", number(of_dense.value, 2), *values])
        columns.append(["/ dense", "1.000", *(_cell([row.ratios[text] for row in same]) for same in groups)])
    for task, result in dense.tasks.items():
        found = [[row.tasks[task].acc if task in row.tasks else None for row in same] for same in groups]
        columns.append([task, number(result.acc), *map(_cell, found)])
    columns += [["kept above chance", "1.000", *map(_kept, groups)]] if dense.tasks else []
    speeds = [_cell([row.tokens_per_second for row in same], 0) for same in groups]
    seconds = [_cell([row.seconds.total for row in same], 0) for same in groups]
    memory = [number(max(row.peak_resident_bytes for row in same) / 1e9, 1) for same in groups]
    columns += [["tokens/s", number(dense.tokens_per_second, 0), *speeds], ["seconds", "", *seconds],
                ["memory, GB", "", *memory]]  # fmt: skip
    headings, *rows = map(list, zip(*columns, strict=True))
    return headings, rows


def task_table(comparison: Comparison, ratio: float) -> Table:
    """Accuracy and standard error of every method at one pruning ratio, and the kept share above chance."""
    tasks = list(comparison.dense.tasks)
    lines = [["dense", "", *(accuracy(comparison.dense.tasks[task]) for task in tasks), "1.000"]]
    for row in comparison.at_ratio(ratio):
        if row.tasks:
            cells = [accuracy(row.tasks[task]) for task in tasks]
            lines.append([row.method, "yes" if row.restored else "no", *cells, _kept([row])])
    return ["method", "restored", *tasks, "kept above chance (95 %)"], lines


def ratio_table(comparison: Comparison, text: str, restored: bool) -> Table:
    """Methods by ratios: perplexity over that of the dense model on one text."""
    found: defaultdict[str, dict[float, str]] = defaultdict(dict)
    for (method, ratio, kind), same in merged_over_seeds(comparison.rows).items():
        if kind is restored:
            found[method][ratio] = _cell([row.ratios[text] for row in same])
    ratios = sorted({ratio for cells in found.values() for ratio in cells})
    rows = [[method, *(cells.get(ratio, "") for ratio in ratios)] for method, cells in found.items()]
    return ["method", *map(percent, ratios)], rows


def _cell(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean ± sample deviation of several seeds; empty if a value is missing, no deviation for a single seed."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values):
        return ""
    spread = f" ± {number(float(np.std(known, ddof=1)), digits)}" if len(known) > 1 else ""
    return number(float(np.mean(known)), digits) + spread


def _kept(rows: Sequence[ComparisonRow]) -> str:
    kept = rows[0].kept_accuracy
    if len(rows) > 1 or kept is None:
        return _cell([None if row.kept_accuracy is None else row.kept_accuracy.value for row in rows])
    return f"{number(kept.value)} ({number(kept.low)} to {number(kept.high)})" if math.isfinite(kept.value) else ""
