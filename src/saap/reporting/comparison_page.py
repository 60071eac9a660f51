"""The page about a comparison of methods."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from saap.core.evaluation_records import Comparison, EvalReport
from saap.reporting import comparison_figures as drawn
from saap.reporting.comparison_tables import comparison_table, merged_over_seeds, ratio_table, task_table
from saap.reporting.figures import Figure, words
from saap.reporting.page import Page, Section
from saap.reporting.sections import environment_section, evaluation_sections
from saap.reporting.tables import number, percent, short


def comparison_page(comparison: Comparison, reports: Sequence[EvalReport]) -> Page:
    """The page of a whole comparison. reports: of `saap eval`."""
    dense, ratio = comparison.dense, _middle_ratio(comparison)
    first = next(iter(dense.perplexity))
    best = []
    for restored, how in ((False, "cut only"), (True, "with reconstruction for all")):
        means = [
            (fmean(known), method)
            for (method, at, kind), rows in merged_over_seeds(comparison.rows).items()
            if (at, kind) == (ratio, restored) and (known := [value for row in rows if (value := row.ratios[first])])
        ]
        best += [(how, *min(means))] if means else []
    count = len(comparison.methods)
    said = {"methods": count, "model": comparison.model, "text": short(first), "ratio": ratio, "best": best}
    tiles = [
        (str(count), "methods"),
        (", ".join(map(percent, comparison.ratios)), "of the blocks removed"),
        (f"{dense.parameters:,}", "parameters of the dense model"),
        (number(dense.perplexity[first].value, 2), f"its perplexity on {short(first)}"),
    ]
    sections = [
        ratio_section(comparison),
        *(
            Section(
                name=f"tasks-{ratio:g}".replace(".", "-"),
                title=f"Questions answered without examples, {percent(ratio)} removed",
                figures=drawn.kept_above_chance(comparison, ratio),
                tables=[("Accuracy and standard error", task_table(comparison, ratio))],
            )
            for ratio in sorted({row.ratio for row in comparison.rows if row.tasks})
        ),
        Section(
            name="cost",
            title="Speed, time and memory",
            figures=[*drawn.speed_by_ratio(comparison), drawn.seconds_by_method(comparison, ratio)],
            tables=[("Every row", comparison_table(comparison))],
        ),
        *evaluation_sections(reports),
        environment_section(comparison, reports),
    ]
    title = f"Methods compared on {comparison.model}"
    return Page(title=title, summary=words("comparison_summary", **said), tiles=tiles, sections=sections)


def ratio_section(comparison: Comparison) -> Section:
    """Perplexity against the pruning ratio for all methods, and the contribution of reconstruction."""
    kinds = sorted({row.restored for row in comparison.rows})
    figures: list[Figure] = []
    tables = []
    for text in comparison.dense.perplexity:
        figures += [drawn.perplexity_by_ratio(comparison, text, restored) for restored in kinds]
        figures += drawn.reconstruction_gain(comparison, text, _middle_ratio(comparison))
        for restored in kinds:
            how = "reconstructed" if restored else "cut only"
            heading = f"{short(text)}, perplexity / dense, {how}; bold: best of a column"
            tables.append((heading, ratio_table(comparison, text, restored)))
    title = "Perplexity by pruning ratio"
    return Section(name="ratios", title=title, figures=figures, tables=tables, lowest_is_best=True)


def _middle_ratio(comparison: Comparison) -> float:
    """The ratio of single-ratio figures: 20 % if available, otherwise the middle one."""
    ratios = comparison.ratios
    return 0.2 if 0.2 in ratios else ratios[len(ratios) // 2]
