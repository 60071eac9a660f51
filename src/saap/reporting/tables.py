"""Tables as rows of text, written as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from saap.core.evaluation_records import TaskResult
from saap.core.storage import write_whole

Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""

MEASURES = (
    ("distinct_1", "distinct words, %", 100), ("distinct_2", "distinct pairs, %", 100),
    ("distinct_3", "distinct triples, %", 100), ("repetition", "repeated, %", 100), ("tokens", "tokens", 1),
    ("dense_perplexity", "perplexity under the dense model", 1),
)  # fmt: skip
"""Measures of generated text: field, label, factor of the shown number."""

_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#",
    "$": r"\$", "±": r"$\pm$", "{": r"\{", "}": r"\}",
})  # fmt: skip


def number(value: float | None, digits: int = 3, factor: float = 1) -> str:
    """A number for a table, times a factor; an empty cell if it was not measured or is not finite."""
    if value is None or not math.isfinite(factor * value):
        return ""
    shown = factor * value
    return f"{shown:.{digits if abs(shown) < 1000 else 0}f}" if abs(shown) < 1e6 else f"{shown:.2e}"


def percent(ratio: float) -> str:
    """A pruning ratio in percent, with as many digits as it has."""
    return f"{100 * ratio:g}%"


def accuracy(result: TaskResult) -> str:
    """Accuracy and standard error of a task."""
    return f"{result.acc:.3f} ± {result.acc_stderr:.3f}"


def short(text: str) -> str:
    """The last part of a path, or an unchanged name."""
    return text.rstrip("/").rpartition("/")[2]


def names_apart(models: Sequence[tuple[str, str | None]]) -> list[str]:
    """Labels of models given as (source, revision): the source, with the revision if sources are equal."""
    sources = [source for source, _ in set(models)]
    return [
        f"{source}@{revision}" if revision is not None and sources.count(source) > 1 else source
        for source, revision in models
    ]


def numbered(names: Iterable[str]) -> list[str]:
    """The names, with a number at the end of each that is there already; upper and lower case are the same in files."""
    found: dict[str, str] = {}
    for name in names:
        one, count = name, 1
        while one.lower() in found:
            count += 1
            one = f"{name}-{count}"
        found[one.lower()] = one
    return list(found.values())


def to_csv(table: Table) -> str:
    """Comma-separated values with a heading line."""
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows([table[0], *table[1]])
    return content.getvalue()


def to_markdown(table: Table) -> str:
    """A Markdown table; bars, HTML, links and line breaks in cells are escaped or removed."""

    def escaped(cell: str) -> str:
        return re.sub(r"([|\[\]\\])", r"\\\1", " ".join(cell.split())).replace("<", "&lt;")

    lines = [map(escaped, table[0]), ["---"] * len(table[0]), *(map(escaped, line) for line in table[1])]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def to_latex(table: Table) -> str:
    """A `tabular` with booktabs rules."""
    headings, *rows = (
        " & ".join(" ".join(cell.split()).translate(_LATEX) for cell in cells) + r" \\"
        for cells in (table[0], *table[1])
    )
    begin = r"\begin{tabular}{l" + "r" * (len(table[0]) - 1) + "}"
    lines = [begin, r"\toprule", headings, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


WRITERS = {"csv": to_csv, "md": to_markdown, "tex": to_latex}


def write_table(table: Table, path: Path, endings: Sequence[str] = tuple(WRITERS)) -> list[Path]:
    """Write a table in several forms. path: of the files, without their endings."""
    paths = [path.with_name(f"{path.name}.{ending}") for ending in endings]
    for ending, file in zip(endings, paths, strict=True):
        write_whole(file, WRITERS[ending](table).encode())
    return paths
