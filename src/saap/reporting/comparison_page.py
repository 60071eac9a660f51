"""The page about a comparison, and the part of it that is shown with a pruned model."""

from __future__ import annotations

from collections.abc import Sequence

from saap.core.evaluation_records import Comparison, EvalReport
from saap.reporting import comparison_figures as drawn
from saap.reporting.page import Page, Section
from saap.reporting.sections import environment_section, evaluation_sections
from saap.reporting.tables import comparison_table, number, ratio_table, short, task_table
from saap.reporting.words import words


def ratio_section(comparison: Comparison) -> Section:
    """Perplexity against the pruning ratio for all methods, and what reconstruction contributes."""
    kinds = sorted({row.restored for row in comparison.rows})
    figures = []
    tables = []
    for text in comparison.dense.perplexity:
        figures += [drawn.perplexity_by_ratio(comparison, text, restored) for restored in kinds]
        gain = drawn.reconstruction_gain(comparison, text, _middle_ratio(comparison))
        figures += [] if gain is None else [gain]
        for restored in kinds:
            how = "reconstructed" if restored else "cut only"
            caption = f"{short(text)}, perplexity / dense, {how}; bold: best of a column"
            tables.append((caption, ratio_table(comparison, text, restored)))
    title = "Perplexity by pruning ratio"
    return Section(name="ratios", title=title, figures=figures, tables=tables, lowest_is_best=True)


def _task_section(comparison: Comparison, ratio: float) -> Section:
    figure = drawn.kept_above_chance(comparison, ratio)
    return Section(
        name=f"tasks-{ratio:g}".replace(".", "-"),
        title=f"Questions answered without examples, {ratio:.0%} removed",
        figures=[] if figure is None else [figure],
        tables=[("Accuracy and standard error", task_table(comparison, ratio))],
    )


def _middle_ratio(comparison: Comparison) -> float:
    """The ratio that single figures are about: 20 % where it is there, the middle one elsewhere."""
    ratios = comparison.ratios
    return 0.2 if 0.2 in ratios else ratios[len(ratios) // 2]


def comparison_page(comparison: Comparison, reports: Sequence[EvalReport]) -> Page:
    """The page of a whole comparison. reports: of `saap eval`."""
    dense, methods = comparison.dense, str(len(comparison.methods))
    text = next(iter(dense.perplexity))
    speed = drawn.speed_by_ratio(comparison)
    cost = drawn.seconds_by_method(comparison, _middle_ratio(comparison))
    commands = [comparison.command, *(report.command for report in reports)]
    sections = [
        ratio_section(comparison),
        *(_task_section(comparison, ratio) for ratio in sorted({row.ratio for row in comparison.rows if row.tasks})),
        Section(
            name="cost",
            title="Speed, time and memory",
            figures=[cost] if speed is None else [speed, cost],
            tables=[("Every row", comparison_table(comparison))],
        ),
        *evaluation_sections(reports),
        environment_section(commands, comparison.versions, comparison.settings),
    ]
    tiles = [
        (methods, "methods"),
        (", ".join(f"{ratio:.0%}" for ratio in comparison.ratios), "of the blocks removed"),
        (f"{dense.parameters:,}", "parameters of the dense model"),
        (number(dense.perplexity[text].value, 2), f"its perplexity on {short(text)}"),
    ]
    title = f"Methods compared on {comparison.model}"
    return Page(title=title, summary=_summary(comparison, text), tiles=tiles, sections=sections)


def _summary(comparison: Comparison, text: str) -> str:
    """Which method is best at one ratio, cut only and reconstructed."""
    ratio = _middle_ratio(comparison)
    best = []
    for restored, how in ((False, "cut only"), (True, "with reconstruction for all")):
        rows = [row for row in comparison.rows if row.ratio == ratio and row.restored is restored]
        values = [(value, row.method) for row in rows if (value := row.ratios[text])]
        if values:
            best.append((how, *min(values)))
    return words(
        "comparison_summary", methods=len(comparison.methods), model=comparison.model, text=short(text), ratio=ratio,
        best=best,
    )  # fmt: skip
