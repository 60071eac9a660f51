"""The page about a comparison, and the part of it that stands beside a pruned model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from saap.reporting import comparison_figures as drawn
from saap.reporting.figures import Figure
from saap.reporting.page import Page, Section
from saap.reporting.sections import environment_section, evaluation_sections
from saap.reporting.tables import comparison_table, number, ratio_table, short, task_table


def ratio_section(comparison: Mapping[str, Any]) -> Section:
    """Perplexity against the pruning ratio for all methods, and what restoration brings."""
    texts = list(comparison["dense"]["perplexity"])
    kinds = sorted({bool(row["restored"]) for row in comparison["rows"]})
    figures: list[Figure | None] = []
    for text in texts:
        figures += [drawn.perplexity_by_ratio(comparison, text, restored) for restored in kinds]
        figures.append(drawn.restoration_gain(comparison, text, middle_ratio(comparison)))
    return Section(
        name="ratios",
        title="Perplexity by pruning ratio",
        figures=tuple(figure for figure in figures if figure is not None),
        tables=tuple(
            (
                f"{short(text)}, perplexity / dense, {'restored' if restored else 'cut only'}; bold: best of a column",
                ratio_table(comparison, text, restored),
            )
            for text in texts
            for restored in kinds
        ),
        lowest_is_best=True,
    )


def task_sections(comparison: Mapping[str, Any]) -> list[Section]:
    """Zero-shot accuracy at each ratio that tasks were asked at."""
    sections = []
    asked = sorted({row["ratio"] for row in comparison["rows"] if row["tasks"]})
    for ratio in asked:
        figure = drawn.kept_above_chance(comparison, ratio)
        sections.append(
            Section(
                name=f"tasks-{ratio:g}".replace(".", "-"),
                title=f"Questions answered without examples, {ratio:.0%} removed",
                figures=() if figure is None else (dataclasses.replace(figure, name=f"{figure.name}-{ratio:g}"),),
                tables=(("Accuracy and standard error", task_table(comparison, ratio)),),
            )
        )
    return sections


def middle_ratio(comparison: Mapping[str, Any]) -> float:
    """The ratio that single figures are about: 20 % where it is there, the middle one elsewhere."""
    ratios = sorted({float(row["ratio"]) for row in comparison["rows"]})
    return 0.2 if 0.2 in ratios else ratios[len(ratios) // 2]


def comparison_page(comparison: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> Page:
    """The page of a whole comparison. reports: of `saap eval`."""
    text = next(iter(comparison["dense"]["perplexity"]))
    methods = list(dict.fromkeys(row["method"] for row in comparison["rows"]))
    ratios = sorted({row["ratio"] for row in comparison["rows"]})
    speed = drawn.speed_by_ratio(comparison)
    cost = drawn.seconds_by_method(comparison, middle_ratio(comparison))
    sections = [
        ratio_section(comparison),
        *task_sections(comparison),
        Section(
            name="cost",
            title="Speed, time and memory",
            figures=(*(() if speed is None else (speed,)), cost),
            tables=(("Every row", comparison_table(comparison)),),
        ),
        *evaluation_sections(reports),
        environment_section(
            [comparison.get("command", ()), *(report.get("command", ()) for report in reports)],
            comparison["versions"],
            comparison["settings"],
        ),
    ]
    tiles = (
        (str(len(methods)), "methods"),
        (", ".join(f"{ratio:.0%}" for ratio in ratios), "of the blocks removed"),
        (f"{comparison['dense']['parameters']:,}", "parameters of the dense model"),
        (number(comparison["dense"]["perplexity"][text]["value"], 2), f"its perplexity on {short(text)}"),
    )
    return Page(
        title=f"Methods compared on {comparison['model']}",
        summary=_summary(comparison, text, len(methods)),
        tiles=tiles,
        sections=tuple(sections),
    )


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
