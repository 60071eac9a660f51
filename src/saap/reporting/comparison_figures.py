"""The figures about a comparison of methods. A comparison: the content of `comparison.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saap.reporting.figures import COLOURS, INK, MARKERS, Figure, legend_outside, plain_ticks
from saap.reporting.tables import measured_at, merged_over_seeds, short

OURS = "saap"
STEPS = ("score", "search", "make")


def _methods(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _look(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """A colour and a marker that a method has in every figure of its comparison."""
    place = methods.index(method)
    turn = place // len(COLOURS)  # the second method of a colour has another marker than the first
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + 3 * turn) % len(MARKERS)]}


def perplexity_by_ratio(comparison: Mapping[str, Any], text: str, restored: bool) -> Figure:
    """Perplexity over dense against the pruning ratio, one line a method."""
    methods = _methods(comparison["rows"])
    lines: dict[str, list[tuple[float, np.ndarray[Any, Any]]]] = {}
    for entry in merged_over_seeds(comparison["rows"]):
        values = np.array([row["ratios"][text] for row in entry["rows"] if row["ratios"][text]])
        if entry["restored"] is restored and len(values):
            lines.setdefault(entry["method"], []).append((entry["ratio"], values))
    ratios = sorted({ratio for points in lines.values() for ratio, _ in points})
    means = [float(values.mean()) for points in lines.values() for _, values in points] or [1.0]

    def draw(axis: Any) -> None:
        from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

        for method, points in lines.items():
            points.sort(key=lambda point: point[0])
            axis.errorbar(
                [100 * ratio for ratio, _ in points], [values.mean() for _, values in points],
                yerr=[values.std(ddof=1) if len(values) > 1 else 0 for _, values in points],
                **_look(method, methods), markersize=7 if method == OURS else 4.5, label=method, capsize=2,
                linewidth=2.6 if method == OURS else 1.1, zorder=3 if method == OURS else 2,
            )  # fmt: skip
        axis.set(xlabel="removed of the blocks' parameters", ylabel="perplexity / dense", yscale="log")
        axis.xaxis.set_major_locator(FixedLocator([100 * ratio for ratio in ratios]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        plain_ticks(axis.yaxis, min(means), max(means))
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
    for entry in merged_over_seeds(comparison["rows"]):
        values = [row["ratios"][text] for row in entry["rows"] if row["ratios"][text]]
        if entry["ratio"] == ratio and values:
            found.setdefault(entry["method"], {})[entry["restored"]] = float(np.mean(values))
    both = {method: pair for method, pair in found.items() if len(pair) == 2}
    if not both:
        return None
    order = sorted(both, key=lambda method: both[method][True])

    def draw(axis: Any) -> None:
        places = np.arange(len(order))
        restored, cut = ([both[method][kind] for method in order] for kind in (True, False))
        axis.hlines(places, restored, cut, color=INK, alpha=0.4, linewidth=1.5, zorder=1)
        axis.scatter(cut, places, color=COLOURS[1], marker="o", label="cut only", zorder=2)
        axis.scatter(restored, places, color=COLOURS[2], marker="D", label="restored", zorder=2)
        axis.set_yticks(places, order)
        axis.invert_yaxis()
        axis.set(xlabel="perplexity / dense")
        if max(cut) > 4 * min(restored):
            axis.set(xscale="log")
            plain_ticks(axis.xaxis, min(restored), max(cut))
        axis.grid(visible=False, axis="y")
        legend_outside(axis)

    best = order[0]
    said = f"Best after restoration is {best} with {both[best][True]:.2f} ({both[best][False]:.2f} cut only)."
    return Figure(
        name=f"gain-{short(text)}",
        title=f"{short(text)}: selection and restoration told apart, {ratio:.0%} removed",
        text=f"The circles compare what the methods choose, the lines show what restoration brings back. {said}",
        draw=draw,
        height=0.9 + 0.27 * len(order),
    )


def kept_above_chance(comparison: Mapping[str, Any], ratio: float) -> Figure | None:
    """Share of the dense accuracy above chance with its interval, one row a method and restoration."""
    rows = [row for row in measured_at(comparison, ratio) if None not in (row["kept_accuracy"] or {"": None}).values()]
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: -row["kept_accuracy"]["value"])
    labels = [f"{row['method']}{', restored' if row['restored'] else ''}" for row in rows]

    def draw(axis: Any) -> None:
        places = np.arange(len(rows))
        for restored, colour, mark, label in (
            (False, COLOURS[1], "o", "cut only"),
            (True, COLOURS[2], "D", "restored"),
        ):
            here = [place for place in places if rows[place]["restored"] is restored]
            kept = [rows[place]["kept_accuracy"] for place in here]
            if kept:
                sides = [[100 * max(0, one["value"] - one["low"]) for one in kept],
                         [100 * max(0, one["high"] - one["value"]) for one in kept]]  # fmt: skip
                axis.errorbar([100 * one["value"] for one in kept], here, xerr=sides, fmt=mark, color=colour,
                              label=label, capsize=3)  # fmt: skip
        axis.axvline(100, color=INK, linestyle=":", linewidth=1, label="dense")
        axis.set_yticks(places, labels)
        axis.invert_yaxis()
        axis.set(xlabel="% of the dense accuracy above chance")
        axis.grid(visible=False, axis="y")
        legend_outside(axis)

    names = ", ".join(rows[0]["tasks"])
    text = (
        f"Sum over {names} of what a model answers better than guessing, relative to the dense model; whiskers are "
        "95 % intervals of a paired bootstrap over the questions."
    )
    return Figure(
        name="kept", title=f"Zero-shot accuracy kept, {ratio:.0%} removed", text=text, draw=draw,
        height=0.9 + 0.27 * len(rows),
    )  # fmt: skip


def speed_by_ratio(comparison: Mapping[str, Any]) -> Figure | None:
    """Speed of reading relative to the dense model against the pruning ratio."""
    dense = comparison["dense"]["tokens_per_second"]
    rows = [row for row in comparison["rows"] if row["tokens_per_second"]]
    if not dense or not rows:
        return None
    methods = _methods(comparison["rows"])

    def draw(axis: Any) -> None:
        from matplotlib.ticker import FixedLocator, PercentFormatter

        for method in methods:
            mine = [row for row in rows if row["method"] == method]
            axis.scatter([100 * row["ratio"] for row in mine], [row["tokens_per_second"] / dense for row in mine],
                         **_look(method, methods), s=28, alpha=0.8, label=method)  # fmt: skip
        axis.axhline(1, color=INK, linestyle=":", linewidth=1)
        axis.xaxis.set_major_locator(FixedLocator(sorted({100 * row["ratio"] for row in rows})))
        axis.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        axis.set(xlabel="removed of the blocks' parameters", ylabel="tokens per second / dense")
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
        places, left = np.arange(len(rows)), np.zeros(len(rows))
        for index, step in enumerate(STEPS):
            values = np.array([row["seconds"][step] for row in rows])
            bars = axis.barh(places, values, left=left, color=COLOURS[index], label=step)
            left = left + values
        labels = [f"{seconds:,.0f} s, {row['peak_resident_bytes'] / 1e9:.1f} GB"
                  for seconds, row in zip(left, rows, strict=True)]  # fmt: skip
        axis.bar_label(bars, labels=labels, padding=3, fontsize=8.5)
        axis.set_yticks(places, [row["method"] for row in rows])
        axis.invert_yaxis()
        axis.set(xlabel="seconds", xlim=(0, 1.4 * max(left, default=0) or 1))
        axis.grid(visible=False, axis="y")
        legend_outside(axis)

    text = (
        f"At {ratio:.0%} removed{', with restoration' if restored else ''}: scoring the units, searching the "
        "structure, and cutting and restoring; peak memory of the process. A pass that methods share counts for each."
    )
    return Figure(name="cost", title="Time and memory by method", text=text, draw=draw,
                  height=0.9 + 0.27 * len(rows))  # fmt: skip
