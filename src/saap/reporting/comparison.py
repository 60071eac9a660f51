"""The page about a comparison of methods, its figures and its tables."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saap.core.evaluation_records import ComparedModel, Comparison, ComparisonRow, EvalReport
from saap.reporting import figures as fig
from saap.reporting.figures import COLOURS, INK, Figure, caption, words
from saap.reporting.page import Page, Section
from saap.reporting.sections import environment_section, evaluation_sections
from saap.reporting.tables import Table, number, short, write_table

OURS = "saap"
LARGEST_SHARE = 1e6
"""Shares of the dense accuracy below this can be drawn."""
KINDS = ((False, COLOURS[1], "o", "cut only"), (True, COLOURS[2], "D", "reconstructed"))
"""Whether a model is reconstructed by least squares, and how that is drawn."""


def comparison_page(comparison: Comparison, reports: Sequence[EvalReport]) -> Page:
    """The page of a whole comparison. reports: of `saap eval`."""
    dense, methods = comparison.dense, str(len(comparison.methods))
    text = next(iter(dense.perplexity))
    speed = speed_by_ratio(comparison)
    cost = seconds_by_method(comparison, _middle_ratio(comparison))
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


def ratio_section(comparison: Comparison) -> Section:
    """Perplexity against the pruning ratio for all methods, and what reconstruction contributes."""
    kinds = sorted({row.restored for row in comparison.rows})
    figures = []
    tables = []
    for text in comparison.dense.perplexity:
        figures += [perplexity_by_ratio(comparison, text, restored) for restored in kinds]
        gain = reconstruction_gain(comparison, text, _middle_ratio(comparison))
        figures += [] if gain is None else [gain]
        for restored in kinds:
            how = "reconstructed" if restored else "cut only"
            heading = f"{short(text)}, perplexity / dense, {how}; bold: best of a column"
            tables.append((heading, ratio_table(comparison, text, restored)))
    title = "Perplexity by pruning ratio"
    return Section(name="ratios", title=title, figures=figures, tables=tables, lowest_is_best=True)


def _task_section(comparison: Comparison, ratio: float) -> Section:
    figure = kept_above_chance(comparison, ratio)
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


def merged_over_seeds(rows: Sequence[ComparisonRow]) -> Mapping[tuple[str, float, bool], list[ComparisonRow]]:
    """The rows of all seeds by method, ratio and whether they are restored, in the order of their first row."""
    grouped: defaultdict[tuple[str, float, bool], list[ComparisonRow]] = defaultdict(list)
    for row in rows:
        grouped[row.method, row.ratio, row.restored].append(row)
    return grouped


def look(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """A colour and a marker that a method has in every figure of its comparison."""
    place = methods.index(method)
    turn = place // len(COLOURS)  # the second method of a colour has another marker than the first
    return {"color": COLOURS[place % len(COLOURS)], "marker": fig.MARKERS[(place + 3 * turn) % len(fig.MARKERS)]}


def _known_ratios(rows: Sequence[ComparisonRow], text: str) -> np.ndarray[Any, Any]:
    return np.array([row.ratios[text] for row in rows if row.ratios[text]])


def perplexity_by_ratio(comparison: Comparison, text: str, restored: bool) -> Figure:
    """Perplexity over that of the dense model against the pruning ratio, one line a method."""
    points = []
    for (method, ratio, kind), rows in sorted(merged_over_seeds(comparison.rows).items()):
        values = _known_ratios(rows, text)
        if kind is restored and len(values):
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            points.append((method, 100 * ratio, values.mean(), spread))
    shown = [method for method in comparison.methods if any(point[0] == method for point in points)]

    def draw(axis: Any) -> None:
        for method in shown:
            _, ratios, means, spreads = zip(*(point for point in points if point[0] == method), strict=True)
            size, width, order = (7, 2.6, 3) if method == OURS else (4.5, 1.1, 2)
            axis.errorbar(
                ratios, means, yerr=spreads, **look(method, comparison.methods), markersize=size, label=method,
                capsize=2, linewidth=width, zorder=order,
            )  # fmt: skip
        axis.set(ylabel="perplexity / dense", yscale="log")
        fig.percent_ticks(axis, [ratio for _, ratio, _, _ in points])
        values = [mean for _, _, mean, _ in points] or [1.0]
        fig.plain_ticks(axis.yaxis, min(values), max(values))

    name = f"ratio-{'restored' if restored else 'cut'}-{short(text)}"
    said = caption("perplexity_by_ratio", text=short(text), restored=restored, methods=len(shown))
    return Figure(name=name, **said, draw=draw, height=4.2)


def reconstruction_gain(comparison: Comparison, text: str, ratio: float) -> Figure | None:
    """What selection and what reconstruction contributes at one ratio, one row a method."""
    found: dict[str, dict[bool, float]] = {}
    for (method, its_ratio, kind), rows in merged_over_seeds(comparison.rows).items():
        values = _known_ratios(rows, text)
        if its_ratio == ratio and len(values):
            found.setdefault(method, {})[kind] = float(values.mean())
    order = sorted((method for method, pair in found.items() if len(pair) == 2), key=lambda one: found[one][True])
    if not order:
        return None
    cut, restored = ([found[method][kind] for method in order] for kind in (False, True))

    def draw(axis: Any) -> None:
        places = np.arange(len(order))
        axis.hlines(places, restored, cut, color=INK, alpha=0.4, linewidth=1.5, zorder=1)
        for (_, colour, mark, label), values in zip(KINDS, (cut, restored), strict=True):
            axis.scatter(values, places, color=colour, marker=mark, label=label, zorder=2)
        fig.name_rows(axis, order)
        axis.set(xlabel="perplexity / dense")
        if max(cut) > 4 * min(restored):
            axis.set(xscale="log")
            fig.plain_ticks(axis.xaxis, min(restored), max(cut))

    said = caption("gain", text=short(text), ratio=ratio, best=order[0], before=cut[0], after=restored[0])
    return Figure(name=f"gain-{short(text)}", **said, draw=draw, height=fig.rows_height(len(order)))


def kept_above_chance(comparison: Comparison, ratio: float) -> Figure | None:
    """Share of the dense accuracy above chance with its interval, one row for each model."""
    rows = []
    for row in comparison.at_ratio(ratio):
        kept = row.kept_accuracy
        if kept is not None and all(abs(end) < LARGEST_SHARE for end in (kept.value, kept.low, kept.high)):
            name = f"{row.method}{', reconstructed' if row.restored else ''}"
            rows.append((kept.value, kept.low, kept.high, row.restored, name))
    rows.sort(key=lambda row: -row[0])

    def draw(axis: Any) -> None:
        for kind, colour, mark, label in KINDS:
            places = [place for place, row in enumerate(rows) if row[3] is kind]
            if places:
                value, low, high = 100 * np.array([rows[place][:3] for place in places]).T
                sides = np.maximum(0, [value - low, high - value])
                axis.errorbar(value, places, xerr=sides, fmt=mark, color=colour, label=label, capsize=3)
        axis.axvline(100, color=INK, linestyle=":", linewidth=1, label="dense")
        fig.name_rows(axis, [name for *_, name in rows])
        axis.set(xlabel="% of the dense accuracy above chance")

    said = caption("kept", ratio=ratio, tasks=comparison.dense.tasks)
    return Figure(name=f"kept-{ratio:g}", **said, draw=draw, height=fig.rows_height(len(rows))) if rows else None


def speed_by_ratio(comparison: Comparison) -> Figure | None:
    """Speed of prefill relative to the dense model against the pruning ratio."""
    dense = comparison.dense.tokens_per_second
    points = [(row.method, 100 * row.ratio, row.tokens_per_second) for row in comparison.rows if row.tokens_per_second]
    if not dense or not points:
        return None

    def draw(axis: Any) -> None:
        for method in dict.fromkeys(method for method, _, _ in points):
            _, ratios, speeds = zip(*(point for point in points if point[0] == method), strict=True)
            style = look(method, comparison.methods)
            axis.scatter(ratios, np.array(speeds) / dense, **style, s=28, alpha=0.8, label=method)
        axis.axhline(1, color=INK, linestyle=":", linewidth=1)
        fig.percent_ticks(axis, [ratio for _, ratio, _ in points])
        axis.set(ylabel="tokens per second / dense")

    return Figure(name="speed", **caption("speed_by_ratio", dense=dense), draw=draw)


def seconds_by_method(comparison: Comparison, ratio: float) -> Figure:
    """What making a model takes, by stage, at one ratio; reconstructed where that was done."""
    restored = any(row.restored for row in comparison.rows if row.ratio == ratio)
    rows = [row for row in comparison.at_ratio(ratio) if row.restored is restored]

    def draw(axis: Any) -> None:
        left = np.zeros(len(rows))
        for colour, stage in zip(COLOURS, ("score", "search", "make"), strict=False):
            values = np.array([getattr(row.seconds, stage) for row in rows])
            bars = axis.barh(range(len(rows)), values, left=left, color=colour, label=stage)
            left = left + values
        labels = [f"{row.seconds.total:,.0f} s, {row.peak_resident_bytes / 1e9:.1f} GB" for row in rows]
        fig.label_bars(axis, bars, labels)
        fig.name_rows(axis, [row.method for row in rows])
        axis.set(xlabel="seconds", xlim=(0, 1.4 * max(left, default=0) or 1))

    said = caption("cost", ratio=ratio, restored=restored)
    return Figure(name="cost", **said, draw=draw, height=fig.rows_height(len(rows)))


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
    """Every method, ratio and reconstruction with all that was measured; means over the seeds, ± their deviation."""
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


def write_tables(folder: Path, comparison: Comparison) -> list[Path]:
    """comparison.csv, .md and .tex in `folder`."""
    return write_table(comparison_table(comparison), folder / "comparison")
