"""The page about a comparison, and the part of it that is shown with a pruned model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from saap.reporting import comparison_figures as drawn
from saap.reporting.figures import Figure
from saap.reporting.inputs import Evaluation
from saap.reporting.page import Page, Section
from saap.reporting.sections import environment_section, evaluation_sections
from saap.reporting.tables import comparison_table, number, ratio_table, short, task_table


def ratio_section(comparison: Mapping[str, Any]) -> Section:
    """Perplexity against the pruning ratio for all methods, and what restoration brings."""
    kinds = sorted({row["restored"] for row in comparison["rows"]})
    figures: list[Figure | None] = []
    tables = []
    for text in comparison["dense"]["perplexity"]:
        figures += [drawn.perplexity_by_ratio(comparison, text, restored) for restored in kinds]
        figures.append(drawn.restoration_gain(comparison, text, middle_ratio(comparison)))
        for restored in kinds:
            how = "restored" if restored else "cut only"
            caption = f"{short(text)}, perplexity / dense, {how}; bold: best of a column"
            tables.append((caption, ratio_table(comparison, text, restored)))
    return Section(
        name="ratios",
        title="Perplexity by pruning ratio",
        figures=[figure for figure in figures if figure is not None],
        tables=tables,
        lowest_is_best=True,
    )


def _task_sections(comparison: Mapping[str, Any]) -> list[Section]:
    """Zero-shot accuracy at each ratio with tasks."""
    sections = []
    for ratio in sorted({row["ratio"] for row in comparison["rows"] if row["tasks"]}):
        figure = drawn.kept_above_chance(comparison, ratio)
        sections.append(
            Section(
                name=f"tasks-{ratio:g}".replace(".", "-"),
                title=f"Questions answered without examples, {ratio:.0%} removed",
                figures=[] if figure is None else [dataclasses.replace(figure, name=f"{figure.name}-{ratio:g}")],
                tables=[("Accuracy and standard error", task_table(comparison, ratio))],
            )
        )
    return sections


def middle_ratio(comparison: Mapping[str, Any]) -> float:
    """The ratio that single figures are about: 20 % where it is there, the middle one elsewhere."""
    ratios = sorted({float(row["ratio"]) for row in comparison["rows"]})
    return 0.2 if 0.2 in ratios else ratios[len(ratios) // 2]


def comparison_page(comparison: Mapping[str, Any], reports: Sequence[Evaluation]) -> Page:
    """The page of a whole comparison. reports: of `saap eval`."""
    dense, rows = comparison["dense"], comparison["rows"]
    text = next(iter(dense["perplexity"]))
    methods, ratios = {row["method"] for row in rows}, sorted({row["ratio"] for row in rows})
    speed = drawn.speed_by_ratio(comparison)
    cost = drawn.seconds_by_method(comparison, middle_ratio(comparison))
    sections = [
        ratio_section(comparison),
        *_task_sections(comparison),
        Section(
            name="cost",
            title="Speed, time and memory",
            figures=[cost] if speed is None else [speed, cost],
            tables=[("Every row", comparison_table(comparison))],
        ),
        *evaluation_sections(reports),
        environment_section(
            [comparison["command"], *(report.command for report in reports)],
            comparison["versions"],
            comparison["settings"],
        ),
    ]
    tiles = [
        (str(len(methods)), "methods"),
        (", ".join(f"{ratio:.0%}" for ratio in ratios), "of the blocks removed"),
        (f"{dense['parameters']:,}", "parameters of the dense model"),
        (number(dense["perplexity"][text]["value"], 2), f"its perplexity on {short(text)}"),
    ]
    title, summary = f"Methods compared on {comparison['model']}", _summary(comparison, text, len(methods))
    return Page(title=title, summary=summary, tiles=tiles, sections=sections)


def _summary(comparison: Mapping[str, Any], text: str, methods: int) -> str:
    """Which method is best at one ratio, cut only and restored."""
    ratio = middle_ratio(comparison)
    said = []
    for restored, how in ((False, "cut only"), (True, "with restoration for all")):
        rows = [row for row in comparison["rows"] if row["ratio"] == ratio and row["restored"] is restored]
        rows = [row for row in rows if row["ratios"][text]]
        if rows:
            best = min(rows, key=lambda row: row["ratios"][text])
            said.append(f"{how}, {best['method']} stays nearest with {best['ratios'][text]:.2f} times its perplexity")
    return (
        f"{methods} methods removed the same share of {comparison['model']}, calibrated on the same text. Perplexity "
        f"says how surprised a model is by the next word of {short(text)}: lower is better. Against the dense model "
        f"and at {ratio:.0%} removed: {'; '.join(said)}."
    )
