"""The figures about a comparison of methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from saap.core.evaluation_records import Comparison, ComparisonRow
from saap.reporting.figures import (
    COLOURS,
    INK,
    MARKERS,
    Figure,
    label_bars,
    name_rows,
    percent_ticks,
    plain_ticks,
    rows_height,
)
from saap.reporting.tables import merged_over_seeds, short
from saap.reporting.words import caption

OURS = "saap"
LARGEST_SHARE = 1e6
"""Shares of the dense accuracy below this can be drawn."""
KINDS = ((False, COLOURS[1], "o", "cut only"), (True, COLOURS[2], "D", "reconstructed"))
"""Whether a model is reconstructed by least squares, and how that is drawn."""


def look(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """A colour and a marker that a method has in every figure of its comparison."""
    place = methods.index(method)
    turn = place // len(COLOURS)  # the second method of a colour has another marker than the first
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + 3 * turn) % len(MARKERS)]}


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
        percent_ticks(axis, [ratio for _, ratio, _, _ in points])
        values = [mean for _, _, mean, _ in points] or [1.0]
        plain_ticks(axis.yaxis, min(values), max(values))

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
        name_rows(axis, order)
        axis.set(xlabel="perplexity / dense")
        if max(cut) > 4 * min(restored):
            axis.set(xscale="log")
            plain_ticks(axis.xaxis, min(restored), max(cut))

    said = caption("gain", text=short(text), ratio=ratio, best=order[0], before=cut[0], after=restored[0])
    return Figure(name=f"gain-{short(text)}", **said, draw=draw, height=rows_height(len(order)))


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
        name_rows(axis, [name for *_, name in rows])
        axis.set(xlabel="% of the dense accuracy above chance")

    said = caption("kept", ratio=ratio, tasks=comparison.dense.tasks)
    return Figure(name=f"kept-{ratio:g}", **said, draw=draw, height=rows_height(len(rows))) if rows else None


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
        percent_ticks(axis, [ratio for _, ratio, _ in points])
        axis.set(ylabel="tokens per second / dense")

    return Figure(name="speed", **caption("speed_by_ratio", dense=dense), draw=draw)


def seconds_by_method(comparison: Comparison, ratio: float) -> Figure:
    """What making a model takes, by stage, at one ratio; reconstructed where that was done."""
    restored = any(row.restored for row in comparison.rows if row.ratio == ratio)
    rows = [row for row in comparison.at_ratio(ratio) if row.restored is restored]

    def draw(axis: Any) -> None:
        left = np.zeros(len(rows))
        for index, stage in enumerate(("score", "search", "make")):
            values = np.array([getattr(row.seconds, stage) for row in rows])
            bars = axis.barh(range(len(rows)), values, left=left, color=COLOURS[index], label=stage)
            left = left + values
        memory = [row.peak_resident_bytes / 1e9 for row in rows]
        label_bars(axis, bars, [f"{seconds:,.0f} s, {size:.1f} GB" for seconds, size in zip(left, memory, strict=True)])
        name_rows(axis, [row.method for row in rows])
        axis.set(xlabel="seconds", xlim=(0, 1.4 * max(left, default=0) or 1))

    said = caption("cost", ratio=ratio, restored=restored)
    return Figure(name="cost", **said, draw=draw, height=rows_height(len(rows)))
