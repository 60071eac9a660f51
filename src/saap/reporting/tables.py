"""A comparison as rows of text: one table, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from saap.core.evaluation_records import ComparedModel, Comparison, ComparisonRow
from saap.core.storage import write_whole

Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""

_LATEX = {
    "\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#",
    "$": r"\$", "±": r"$\pm$", "{": r"\{", "}": r"\}",
}  # fmt: skip


def number(value: float | None, digits: int = 3, factor: float = 1) -> str:
    """A number for a table, times a factor; an empty cell for what was not measured or is not finite."""
    if value is None or not math.isfinite(factor * value):
        return ""
    return f"{factor * value:.{digits}f}" if abs(factor * value) < 1000 else f"{factor * value:.2e}"


def merged_over_seeds(rows: Sequence[ComparisonRow]) -> Mapping[tuple[str, float, bool], list[ComparisonRow]]:
    """The rows of all seeds by method, ratio and whether they are restored, in the order of their first row."""
    grouped: defaultdict[tuple[str, float, bool], list[ComparisonRow]] = defaultdict(list)
    for row in rows:
        grouped[row.method, row.ratio, row.restored].append(row)
    return grouped


def task_table(comparison: Comparison, ratio: float) -> Table:
    """Accuracy and standard error of every method at one pruning ratio, and what is kept above chance."""
    tasks = list(comparison.dense.tasks)

    def cells(model: ComparedModel) -> list[str]:
        return [f"{model.tasks[task].acc:.3f} ± {model.tasks[task].acc_stderr:.3f}" for task in tasks]

    lines = [["dense", "", *cells(comparison.dense), "1.000"]]
    for row in comparison.at_ratio(ratio):
        if row.tasks:
            lines.append([row.method, "yes" if row.restored else "no", *cells(row), _kept([row])])
    return ["method", "restored", *tasks, "kept above chance (95 %)"], lines


def comparison_table(comparison: Comparison) -> Table:
    """Every method, ratio and restoration with all that was measured; means over the seeds, ± their deviation."""
    dense = comparison.dense
    texts, tasks = list(dense.perplexity), list(dense.tasks)
    headings = ["method", "asked", "restored", "removed", "parameters"]
    headings += [column for text in texts for column in (f"perplexity {short(text)}", "/ dense")]
    headings += [*tasks, *(["kept above chance"] if tasks else []), "tokens/s", "seconds", "memory, GB"]
    first = ["dense", "", "", "", f"{dense.parameters:,}"]
    for text in texts:
        first += [number(dense.perplexity[text].value, 2), "1.000"]
    first += [number(dense.tasks[task].acc) for task in tasks] + (["1.000"] if tasks else [])
    rows = [[*first, number(dense.tokens_per_second, 0), "", ""]]
    for (method, ratio, restored), same in merged_over_seeds(comparison.rows).items():
        cells = [method, f"{ratio:g}", "yes" if restored else "no"]
        cells += [f"{np.mean([row.pruning_ratio for row in same]):.1%}", f"{same[0].parameters:,}"]
        for text in texts:
            cells.append(_cell([row.perplexity[text].value for row in same], 2))
            cells.append(_cell([row.ratios[text] for row in same]))
        cells += [_cell([row.tasks[task].acc if task in row.tasks else None for row in same]) for task in tasks]
        if tasks:
            cells.append(_kept(same))
        cells.append(_cell([row.tokens_per_second for row in same], 0))
        cells.append(_cell([row.seconds.score + row.seconds.search + row.seconds.make for row in same], 0))
        rows.append([*cells, number(max(row.peak_resident_bytes for row in same) / 1e9, 1)])
    return headings, rows


def ratio_table(comparison: Comparison, text: str, restored: bool) -> Table:
    """Methods by ratios: perplexity over that of the dense model on one text."""
    found = {
        (method, ratio): _cell([row.ratios[text] for row in same])
        for (method, ratio, kind), same in merged_over_seeds(comparison.rows).items()
        if kind is restored
    }
    ratios = sorted({ratio for _, ratio in found})
    return ["method", *(f"{ratio:.0%}" for ratio in ratios)], [
        [method, *(found.get((method, ratio), "") for ratio in ratios)]
        for method in dict.fromkeys(method for method, _ in found)
    ]


def short(text: str) -> str:
    """The last part of a path, or a name as it is."""
    return text.rpartition("/")[2]


def names_apart(models: Sequence[tuple[str, str | None]]) -> list[str]:
    """Names of models, given as (source, revision): the source, with the revision where two have the same source."""
    sources = [source for source, _ in set(models)]
    return [
        f"{source}@{revision}" if revision is not None and sources.count(source) > 1 else source
        for source, revision in models
    ]


def _cell(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean ± sample deviation of several seeds; empty where a value lacks, no deviation for a single one."""
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


def to_csv(table: Table) -> str:
    """Comma-separated values with a heading line."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(table[0])
    writer.writerows(table[1])
    return content.getvalue()


def to_markdown(table: Table) -> str:
    """A table for Markdown; a cell has no bars, HTML, links or further lines of its own."""

    def escaped(cell: str) -> str:
        return re.sub(r"([|\[\]\\])", r"\\\1", " ".join(cell.split())).replace("<", "&lt;")

    lines = [map(escaped, table[0]), ["---"] * len(table[0]), *(map(escaped, line) for line in table[1])]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def to_latex(table: Table) -> str:
    """A `tabular` with rules of the package booktabs."""

    def escaped(cell: str) -> str:
        return "".join(_LATEX.get(character, character) for character in " ".join(cell.split()))

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(escaped, cells)) + r" \\" + "\n"

    columns = "l" + "r" * (len(table[0]) - 1)
    body = "".join(map(line, table[1]))
    return (
        rf"\begin{{tabular}}{{{columns}}}" + "\n\\toprule\n" + line(table[0]) + "\\midrule\n" + body
        + "\\bottomrule\n\\end{tabular}\n"
    )  # fmt: skip


WRITERS = {"csv": to_csv, "md": to_markdown, "tex": to_latex}


def write_table(table: Table, path: Path, endings: Sequence[str] = tuple(WRITERS)) -> list[Path]:
    """Write a table in several forms. path: of the files, without their endings."""
    paths = [path.with_name(f"{path.name}.{ending}") for ending in endings]
    for ending, file in zip(endings, paths, strict=True):
        write_whole(file, WRITERS[ending](table).encode())
    return paths


def write_tables(folder: Path, comparison: Comparison) -> list[Path]:
    """comparison.csv, .md and .tex in `folder`."""
    return write_table(comparison_table(comparison), folder / "comparison")
