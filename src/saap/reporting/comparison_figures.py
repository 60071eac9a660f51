"""The figures about a comparison of methods. A comparison: the content of `comparison.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saap.reporting.figures import (
    COLOURS,
    INK,
    MARKERS,
    Figure,
    label_bars,
    legend_outside,
    name_rows,
    percent_ticks,
    plain_ticks,
    rows_height,
)
from saap.reporting.tables import measured_at, merged_over_seeds, short

OURS = "saap"
STEPS = ("score", "search", "make")
KINDS = ((False, COLOURS[1], "o", "cut only"), (True, COLOURS[2], "D", "restored"))
"""Whether a model is restored, and how that is drawn."""


def look(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """A colour and a marker that a method has in every figure of its comparison."""
    place = methods.index(method)
    turn = place // len(COLOURS)  # the second method of a colour has another marker than the first
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + 3 * turn) % len(MARKERS)]}


def _methods(comparison: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in comparison["rows"]))


def _known_ratios(rows: Sequence[Mapping[str, Any]], text: str) -> np.ndarray[Any, Any]:
    """Perplexities over that of the dense model, of the rows where both are finite."""
    return np.array([row["ratios"][text] for row in rows if row["ratios"][text]])


def perplexity_by_ratio(comparison: Mapping[str, Any], text: str, restored: bool) -> Figure:
    """Perplexity over dense against the pruning ratio, one line a method."""
    methods = _methods(comparison)
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for (method, ratio, kind), rows in sorted(
        merged_over_seeds(comparison["rows"]).items(), key=lambda item: (methods.index(item[0][0]), item[0][1])
    ):
        values = _known_ratios(rows, text)
        if kind is restored and len(values):
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            lines.setdefault(method, []).append((100 * ratio, values.mean(), spread))

    def draw(axis: Any) -> None:
        points = [point for line in lines.values() for point in line] or [(0.0, 1.0, 0.0)]
        for method, line in lines.items():
            ratios, means, spreads = zip(*line, strict=True)
            size, width, order = (7, 2.6, 3) if method == OURS else (4.5, 1.1, 2)
            axis.errorbar(
                ratios, means, yerr=spreads, **look(method, methods), markersize=size, label=method, capsize=2,
                linewidth=width, zorder=order,
            )  # fmt: skip
        axis.set(ylabel="perplexity / dense", yscale="log")
        percent_ticks(axis, (ratio for ratio, _, _ in points))
        plain_ticks(axis.yaxis, min(mean for _, mean, _ in points), max(mean for _, mean, _ in points))
        legend_outside(axis)

    with_restoration = "with restoration by saap for every method" if restored else "cut only"
    return Figure(
        name=f"ratio-{'restored' if restored else 'cut'}-{short(text)}",
        title=f"{short(text)}: perplexity by pruning ratio, {with_restoration}",
        text=f"{len(lines)} methods; lower is better, 1 is the dense model. The table below has the numbers.",
        draw=draw,
        height=4.2,
    )


def restoration_gain(comparison: Mapping[str, Any], text: str, ratio: float) -> Figure | None:
    """What selection and what restoration brings at one ratio: cut only and restored, one row a method."""
    found: dict[str, dict[bool, float]] = {}
    for (method, its_ratio, kind), rows in merged_over_seeds(comparison["rows"]).items():
        values = _known_ratios(rows, text)
        if its_ratio == ratio and len(values):
            found.setdefault(method, {})[kind] = float(values.mean())
    both = {method: pair for method, pair in found.items() if len(pair) == 2}
    if not both:
        return None
    order = sorted(both, key=lambda method: both[method][True])

    def draw(axis: Any) -> None:
        places = np.arange(len(order))
        values = {restored: [both[method][restored] for method in order] for restored in (False, True)}
        axis.hlines(places, values[True], values[False], color=INK, alpha=0.4, linewidth=1.5, zorder=1)
        for restored, colour, mark, label in KINDS:
            axis.scatter(values[restored], places, color=colour, marker=mark, label=label, zorder=2)
        name_rows(axis, order)
        axis.set(xlabel="perplexity / dense")
        if max(values[False]) > 4 * min(values[True]):
            axis.set(xscale="log")
            plain_ticks(axis.xaxis, min(values[True]), max(values[False]))
        legend_outside(axis)

    best = order[0]
    said = f"Best after restoration is {best} with {both[best][True]:.2f} ({both[best][False]:.2f} cut only)."
    return Figure(
        name=f"gain-{short(text)}",
        title=f"{short(text)}: selection and restoration told apart, {ratio:.0%} removed",
        text=f"The circles compare what the methods choose, the lines show what restoration brings back. {said}",
        draw=draw,
        height=rows_height(len(order)),
    )


def kept_above_chance(comparison: Mapping[str, Any], ratio: float) -> Figure | None:
    """Share of the dense accuracy above chance with its interval, one row a method and restoration."""
    rows = [row for row in measured_at(comparison, ratio) if None not in (row["kept_accuracy"] or {"": None}).values()]
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: -row["kept_accuracy"]["value"])

    def draw(axis: Any) -> None:
        for restored, colour, mark, label in KINDS:
            here = [place for place, row in enumerate(rows) if row["restored"] is restored]
            kept = [rows[place]["kept_accuracy"] for place in here]
            if kept:
                sides = [[100 * max(0, sign * (one[end] - one["value"])) for one in kept]
                         for sign, end in ((-1, "low"), (1, "high"))]  # fmt: skip
                axis.errorbar([100 * one["value"] for one in kept], here, xerr=sides, fmt=mark, color=colour,
                              label=label, capsize=3)  # fmt: skip
        axis.axvline(100, color=INK, linestyle=":", linewidth=1, label="dense")
        name_rows(axis, [f"{row['method']}{', restored' if row['restored'] else ''}" for row in rows])
        axis.set(xlabel="% of the dense accuracy above chance")
        legend_outside(axis)

    text = (
        f"Sum over {', '.join(rows[0]['tasks'])} of what a model answers better than guessing, relative to the dense "
        "model; whiskers are 95 % intervals of a paired bootstrap over the questions."
    )
    title = f"Zero-shot accuracy kept, {ratio:.0%} removed"
    return Figure(name="kept", title=title, text=text, draw=draw, height=rows_height(len(rows)))


def speed_by_ratio(comparison: Mapping[str, Any]) -> Figure | None:
    """Speed of reading relative to the dense model against the pruning ratio."""
    dense = comparison["dense"]["tokens_per_second"]
    rows = [row for row in comparison["rows"] if row["tokens_per_second"]]
    if not dense or not rows:
        return None
    methods = _methods(comparison)

    def draw(axis: Any) -> None:
        for method in methods:
            mine = [row for row in rows if row["method"] == method]
            axis.scatter([100 * row["ratio"] for row in mine], [row["tokens_per_second"] / dense for row in mine],
                         **look(method, methods), s=28, alpha=0.8, label=method)  # fmt: skip
        axis.axhline(1, color=INK, linestyle=":", linewidth=1)
        percent_ticks(axis, (100 * row["ratio"] for row in rows))
        axis.set(ylabel="tokens per second / dense")
        legend_outside(axis)

    text = (
        f"While the first text was read, once a model; the dense one read {dense:,.0f} tokens a second. Points above "
        "the dotted line are faster than the dense model. Single runs in a row, so other work on the machine shows."
    )
    return Figure(name="speed", title="Speed by pruning ratio", text=text, draw=draw)


def seconds_by_method(comparison: Mapping[str, Any], ratio: float) -> Figure:
    """What making a model takes, by step, at one ratio; restored where that was done."""
    restored = any(row["restored"] for row in comparison["rows"] if row["ratio"] == ratio)
    rows = [row for row in measured_at(comparison, ratio) if row["restored"] is restored]

    def draw(axis: Any) -> None:
        left = np.zeros(len(rows))
        for index, step in enumerate(STEPS):
            values = np.array([row["seconds"][step] for row in rows])
            bars = axis.barh(range(len(rows)), values, left=left, color=COLOURS[index], label=step)
            left = left + values
        memory = [row["peak_resident_bytes"] / 1e9 for row in rows]
        label_bars(axis, bars, [f"{seconds:,.0f} s, {size:.1f} GB" for seconds, size in zip(left, memory, strict=True)])
        name_rows(axis, [row["method"] for row in rows])
        axis.set(xlabel="seconds", xlim=(0, 1.4 * max(left, default=0) or 1))
        legend_outside(axis)

    text = (
        f"At {ratio:.0%} removed{', with restoration' if restored else ''}: scoring the units, searching the "
        "structure, and cutting and restoring; peak memory of the process. A pass that methods share counts for each."
    )
    return Figure(name="cost", title="Time and memory by method", text=text, draw=draw, height=rows_height(len(rows)))
