"""A comparison as rows of text: one table, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saap.core.storage import write_whole

Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""

_LATEX = {
    "\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#",
    "$": r"\$", "±": r"$\pm$", "{": r"\{", "}": r"\}",
}  # fmt: skip


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; an empty cell for what was not measured or is not finite."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.2e}"


Row = Mapping[str, Any]


def merged_over_seeds(rows: Sequence[Row]) -> Mapping[tuple[str, float, bool], list[Row]]:
    """The rows of all seeds by method, ratio and whether they are restored, in the order of their first row."""
    grouped: defaultdict[tuple[str, float, bool], list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row["method"], row["ratio"], row["restored"]].append(row)
    return grouped


def measured_at(comparison: Mapping[str, Any], ratio: float) -> list[Row]:
    """The rows of one pruning ratio, of the first seed alone where there are several."""
    rows = [row for row in comparison["rows"] if row["ratio"] == ratio]
    return [row for row in rows if row["seed"] == rows[0]["seed"]]


def task_table(comparison: Mapping[str, Any], ratio: float) -> Table:
    """Accuracy and standard error of every method at one pruning ratio, and what is kept above chance."""
    tasks = list(comparison["dense"]["tasks"])
    dense = comparison["dense"]["tasks"]
    lines = [["dense", "", *(_with_error(dense[task]) for task in tasks), "1.000"]]
    for row in measured_at(comparison, ratio):
        if row["tasks"]:
            restored = "yes" if row["restored"] else "no"
            lines.append([row["method"], restored, *(_with_error(row["tasks"][task]) for task in tasks), _kept([row])])
    return ["method", "restored", *tasks, "kept above chance (95 %)"], lines


def _with_error(result: Mapping[str, Any]) -> str:
    return f"{result['acc']:.3f} ± {result['acc_stderr']:.3f}"


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Every method, ratio and restoration with all that was measured; means over the seeds, ± their deviation."""
    texts = list(comparison["dense"]["perplexity"])
    tasks = list(comparison["dense"]["tasks"])
    headings = ["method", "asked", "restored", "removed", "parameters"]
    headings += [column for text in texts for column in (f"perplexity {short(text)}", "/ dense")]
    headings += [*tasks, *(["kept above chance"] if tasks else []), "tokens/s", "seconds", "memory, GB"]
    dense = comparison["dense"]
    first = ["dense", "", "", "", f"{dense['parameters']:,}"]
    for text in texts:
        first += [number(dense["perplexity"][text]["value"], 2), "1.000"]
    first += [number(dense["tasks"][task]["acc"]) for task in tasks] + (["1.000"] if tasks else [])
    first += [number(dense["tokens_per_second"], 0), "", ""]
    rows = [first]
    for (method, ratio, restored), same in merged_over_seeds(comparison["rows"]).items():
        cells = [method, f"{ratio:g}", "yes" if restored else "no"]
        cells += [f"{np.mean([row['pruning_ratio'] for row in same]):.1%}", f"{same[0]['parameters']:,}"]
        for text in texts:
            cells.append(_cell([row["perplexity"][text]["value"] for row in same], 2))
            cells.append(_cell([row["ratios"][text] for row in same]))
        cells += [_cell([row["tasks"].get(task, {}).get("acc") for row in same]) for task in tasks]
        if tasks:
            cells.append(_kept(same))
        cells.append(_cell([row["tokens_per_second"] for row in same], 0))
        cells.append(_cell([sum(row["seconds"].values()) for row in same], 0))
        cells.append(number(max(row["peak_resident_bytes"] for row in same) / 1e9, 1))
        rows.append(cells)
    return headings, rows


def ratio_table(comparison: Mapping[str, Any], text: str, restored: bool) -> Table:
    """Methods by ratios: perplexity over that of the dense model on one text."""
    found = {
        (method, ratio): _cell([row["ratios"][text] for row in same])
        for (method, ratio, kind), same in merged_over_seeds(comparison["rows"]).items()
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
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return ""
    spread = f" ± {number(float(np.std(known, ddof=1)), digits)}" if len(known) > 1 else ""
    return number(float(np.mean(known)), digits) + spread


def _kept(rows: Sequence[Row]) -> str:
    if len(rows) > 1 or rows[0]["kept_accuracy"] is None:
        return _cell([None if row["kept_accuracy"] is None else row["kept_accuracy"]["value"] for row in rows])
    kept = rows[0]["kept_accuracy"]
    return "" if kept["value"] is None else f"{number(kept['value'])} ({number(kept['low'])} to {number(kept['high'])})"


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


def write_tables(folder: Path, comparison: Mapping[str, Any]) -> list[Path]:
    """comparison.csv, .md and .tex in `folder`."""
    return write_table(comparison_table(comparison), folder / "comparison")
