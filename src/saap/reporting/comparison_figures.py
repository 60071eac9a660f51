"""The figures of a comparison of methods."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from saap.core.evaluation_records import Comparison
from saap.core.records import FloatArray
from saap.reporting.comparison_tables import merged_over_seeds
from saap.reporting.figures import COLOURS, INK, MARKERS, Figure, label_bars, name_rows, plain_ticks
from saap.reporting.tables import short

OURS = "saap"
LARGEST_SHARE = 1e6
"""Limit on drawn shares of the dense accuracy."""
KINDS = ((False, COLOURS[1], "o", "cut only"), (True, COLOURS[2], "D", "reconstructed"))
"""Styles of models with and without least-squares reconstruction."""


def look(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Colour and marker of a method in all figures of its comparison."""
    place = methods.index(method)
    turn = place // len(COLOURS)  # methods of the same colour have different markers
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + 3 * turn) % len(MARKERS)]}


def _perplexity_ratios(comparison: Comparison, text: str) -> dict[tuple[str, float, bool], FloatArray]:
    """Perplexity ratios to the dense model for all seeds, by method, pruning ratio and reconstruction."""
    grouped = sorted(merged_over_seeds(comparison.rows).items())
    known = {key: np.array([row.ratios[text] for row in rows if row.ratios[text]]) for key, rows in grouped}
    return {key: values for key, values in known.items() if len(values)}


def perplexity_by_ratio(comparison: Comparison, text: str, restored: bool) -> Figure:
    """Perplexity relative to the dense model against the pruning ratio, one line per method."""
    points: defaultdict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for (method, ratio, kind), values in _perplexity_ratios(comparison, text).items():
        if kind is restored:
            points[method].append((100 * ratio, values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0))

    def draw(axis: Any) -> None:
        for method in (method for method in comparison.methods if method in points):
            ratios, means, spreads = zip(*points[method], strict=True)
            size, width, order = (7, 2.6, 3) if method == OURS else (4.5, 1.1, 2)
            axis.errorbar(
                ratios, means, yerr=spreads, **look(method, comparison.methods), markersize=size, label=method,
                capsize=2, linewidth=width, zorder=order,
            )  # fmt: skip
        axis.set(ylabel="perplexity / dense", yscale="log")
        shown = [point for line in points.values() for point in line]
        _percent_ticks(axis, [ratio for ratio, _, _ in shown])
        values = [mean for _, mean, _ in shown] or [1.0]
        plain_ticks(axis.yaxis, min(values), max(values))

    name = f"ratio-{'restored' if restored else 'cut'}-{short(text)}"
    said = {"text": short(text), "restored": restored, "methods": len(points)}
    return Figure.of(name, "perplexity_by_ratio", draw, height=4.2, said=said)


def reconstruction_gain(comparison: Comparison, text: str, ratio: float) -> list[Figure]:
    """Contributions of selection and reconstruction at one ratio, one row per method; nothing without both."""
    found = _perplexity_ratios(comparison, text)
    means = {(method, kind): float(values.mean()) for (method, at, kind), values in found.items() if at == ratio}
    both = [method for method, kind in means if kind and (method, False) in means]
    if not both:
        return []
    order = sorted(both, key=lambda method: means[method, True])
    cut, restored = ([means[method, kind] for method in order] for kind in (False, True))

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

    said = {"text": short(text), "ratio": ratio, "best": order[0], "before": cut[0], "after": restored[0]}
    return [Figure.of(f"gain-{short(text)}", "gain", draw, rows=len(order), said=said)]


def kept_above_chance(comparison: Comparison, ratio: float) -> list[Figure]:
    """Share of the dense accuracy above chance with its interval, one row per model; nothing without tasks."""
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

    said = {"ratio": ratio, "tasks": comparison.dense.tasks}
    return [Figure.of(f"kept-{ratio:g}", "kept", draw, rows=len(rows), said=said)] if rows else []


def speed_by_ratio(comparison: Comparison) -> list[Figure]:
    """Prefill speed relative to the dense model against the pruning ratio; nothing if it was not measured."""
    dense = comparison.dense.tokens_per_second
    rows = [row for row in comparison.rows if row.tokens_per_second]
    if not dense or not rows:
        return []

    def draw(axis: Any) -> None:
        for method in dict.fromkeys(row.method for row in rows):
            same = [row for row in rows if row.method == method]
            speeds = np.array([row.tokens_per_second for row in same]) / dense
            style = look(method, comparison.methods)
            axis.scatter([100 * row.ratio for row in same], speeds, **style, s=28, alpha=0.8, label=method)
        axis.axhline(1, color=INK, linestyle=":", linewidth=1)
        _percent_ticks(axis, [100 * row.ratio for row in rows])
        axis.set(ylabel="tokens per second / dense")

    return [Figure.of("speed-by-ratio", "speed_by_ratio", draw, said={"dense": dense})]


def seconds_by_method(comparison: Comparison, ratio: float) -> Figure:
    """Time and memory by stage at one ratio, with reconstruction if any model has it."""
    restored = any(row.restored for row in comparison.rows if row.ratio == ratio)
    rows = [row for row in comparison.at_ratio(ratio) if row.restored is restored]

    def draw(axis: Any) -> None:
        left = np.zeros(len(rows))
        for colour, stage in zip(COLOURS, ("score", "search", "make"), strict=False):
            values = np.array([getattr(row.seconds, stage) for row in rows])
            bars = axis.barh(range(len(rows)), values, left=left, color=colour, label=stage)
            left = left + values
        label_bars(axis, bars, [f"{row.seconds.total:,.0f} s, {row.peak_resident_bytes / 1e9:.1f} GB" for row in rows])
        name_rows(axis, [row.method for row in rows])
        axis.set(xlabel="seconds", xlim=(0, 1.4 * max(left, default=0) or 1))

    return Figure.of("cost", "cost", draw, rows=len(rows), said={"ratio": ratio, "restored": restored})


def _percent_ticks(axis: Any, places: Iterable[float]) -> None:
    """Set up the x axis with shares of removed parameters. places: in percent."""
    axis.set(xticks=sorted(set(places)), xlabel="removed of the blocks' parameters")
    axis.xaxis.set_major_formatter("{x:g}%")
