"""The figures about one pruned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saap.core.manifest import StageRecord
from saap.reporting.figures import (
    COLOURS,
    INK,
    Figure,
    label_bars,
    legend_outside,
    name_rows,
    plain_ticks,
    rows_height,
)
from saap.reporting.importance import Agreement, GroupView
from saap.reporting.inputs import ModelSpeed, PlanGroup, TaskAccuracy

POINTS = 800
"""At most so many points in a scatter: more only make the page heavy."""
SCORES = ("vector", "element", "fused")


def structure(groups: Sequence[PlanGroup]) -> Figure:
    """Kept units of one role by layer."""
    role = groups[0].role
    layers, kept, of = zip(*((group.layer, group.kept, group.of) for group in groups), strict=True)

    def draw(axis: Any) -> None:
        axis.bar(layers, of, color=COLOURS[0], alpha=0.22, label="removed")
        axis.bar(layers, kept, color=COLOURS[0], label="kept")
        axis.set(xlabel="layer", ylabel=f"{role} units", xlim=(-0.7, max(layers) + 0.7))
        axis.grid(visible=False, axis="x")
        axis.locator_params(axis="y", integer=True)
        legend_outside(axis)

    least = min(groups, key=lambda group: group.kept / max(1, group.of))
    text = (
        f"Bars of kept units in each of {len(groups)} layers. {sum(kept) / max(1, sum(of)):.0%} of all {role} units "
        f"stay; layer {least.layer} keeps the least, {least.kept:,} of {least.of:,}."
    )
    return Figure(name=f"structure-{role}", title=f"Kept {role} units by layer", text=text, draw=draw, height=2.8)


def importance_by_layer(views: Sequence[GroupView]) -> Figure:
    """Median and middle 80 % of each score by layer, each score divided by its median over all layers."""
    role, layers = views[0].role, [view.layer for view in views]
    ends = np.cumsum([len(view.fused) for view in views])[:-1]
    bands = {}
    for name in SCORES:
        values = np.concatenate([getattr(view, name) for view in views])
        parts = np.split(values / (float(np.median(values)) or 1.0), ends)
        bands[name] = np.stack([np.percentile(part, [10, 50, 90]) for part in parts], axis=1)

    def draw(axis: Any) -> None:
        for index, (name, (low, middle, high)) in enumerate(bands.items()):
            axis.fill_between(layers, low, high, color=COLOURS[index], alpha=0.14, linewidth=0)
            axis.plot(layers, middle, "os^"[index] + "-", color=COLOURS[index], label=name, markersize=3.5)
        axis.set(xlabel="layer", ylabel="importance / median", yscale="log", xlim=(-0.7, max(layers) + 0.7))
        every = np.concatenate(list(bands.values()))
        plain_ticks(axis.yaxis, max(float(every.min()), 1e-2), float(every.max()))
        legend_outside(axis)

    text = (
        f"Lines: the median {role} unit of each layer; bands: the middle 80 % of its units. Each score is divided by "
        "its median over all layers, so 1 is an ordinary unit."
    )
    title = f"Importance of {role} units by layer, before and after fusion"
    return Figure(name=f"by-layer-{role}", title=title, text=text, draw=draw)


def importance_distribution(views: Sequence[GroupView]) -> Figure:
    """Distributions of the scores over the units, before and after fusion, each divided by its median."""
    role = views[0].role
    logs = {}
    for name in SCORES:
        values = np.concatenate([getattr(view, name) for view in views])
        positive = values[values > 0]
        if len(positive):
            logs[name] = np.log10(positive / np.median(positive))

    def draw(axis: Any) -> None:
        low = min((np.percentile(values, 0.5) for values in logs.values()), default=-1.0)
        high = max((np.percentile(values, 99.5) for values in logs.values()), default=1.0)
        bins = np.linspace(low, high, 60).tolist()
        for index, (name, values) in enumerate(logs.items()):
            axis.hist(values, bins=bins, histtype="step", color=COLOURS[index], linewidth=1.6, label=name)
        axis.set(xlabel="importance / median, power of ten", ylabel="units")
        legend_outside(axis)

    text = (
        f"Histograms of the vector-wise, the element-wise and the fused importance of all {role} units, each divided "
        "by its median. A narrow peak means that the score tells the units little apart; the outermost 0.5 % at each "
        "end are left out."
    )
    title = f"Distribution of the importance of {role} units"
    return Figure(name=f"distribution-{role}", title=title, text=text, draw=draw)


def rank_agreement(views: Sequence[GroupView], found: Sequence[Agreement]) -> Figure:
    """Rank correlations by layer."""
    role, layers = views[0].role, [view.layer for view in views]
    pairs = {"vector, element": "vector_element", "vector, fused": "vector_fused", "element, fused": "element_fused"}

    def draw(axis: Any) -> None:
        for index, (label, pair) in enumerate(pairs.items()):
            values = [getattr(one, pair) for one in found]
            axis.plot(layers, values, "os^"[index] + "-", color=COLOURS[index], markersize=4, label=label)
        axis.set(xlabel="layer", ylabel="rank correlation", ylim=(None, 1.02))
        legend_outside(axis)

    text = "Spearman's rank correlation between two scores in each layer; 1 means the same order."
    title = f"Do the scores order the {role} units alike?"
    return Figure(name=f"agreement-{role}", title=title, text=text, draw=draw)


def changed_sides(views: Sequence[GroupView], found: Sequence[Agreement]) -> Figure:
    """By layer, the share of removed units that one score alone would have kept."""
    role = views[0].role
    changed = [
        (view.layer, 100 * (one.changed_from_vector or 0), 100 * one.changed)
        for view, one in zip(views, found, strict=True)
        if one.changed is not None
    ]
    layers, *shares = zip(*changed, strict=True)

    def draw(axis: Any) -> None:
        for index, name in enumerate(("vector", "element")):
            places = np.array(layers) + (index - 0.5) * 0.4
            axis.bar(places, shares[index], 0.4, color=COLOURS[index], label=f"{name} alone")
        axis.set(xlabel="layer", ylabel="% of the removed units")
        axis.grid(visible=False, axis="x")
        legend_outside(axis)

    text = (
        f"Of the units that the fused score would remove, those that one score alone would keep: on average "
        f"{np.mean(shares[0]):.0f} % against the coarse score (vector) and {np.mean(shares[1]):.0f} % against the fine "
        "score (element)."
    )
    title = f"{role} units that change sides by the fusion"
    return Figure(name=f"changed-{role}", title=title, text=text, draw=draw, height=2.8)


def fluctuation(views: Sequence[GroupView]) -> Figure:
    """Fluctuation against importance, removed units apart."""
    role = views[0].role
    mean, variance, kept = (
        np.concatenate([getattr(view, name) for view in views]) for name in ("fused", "fluctuation", "kept")
    )
    spread = np.sqrt(variance)
    chosen = np.random.default_rng(0).permutation(len(mean))[:POINTS]

    def draw(axis: Any) -> None:
        shown = np.isin(np.arange(len(mean)), chosen) & (spread > 0) & (mean > 0)
        for stays, colour, mark, label in ((True, COLOURS[0], "o", "kept"), (False, COLOURS[1], "x", "removed")):
            here, width = shown & (kept == stays), 0 if mark == "o" else 0.8
            axis.scatter(
                mean[here], spread[here], s=9, marker=mark, color=colour, alpha=0.55, label=label, linewidths=width
            )
        axis.set(xlabel="fused importance", ylabel="fluctuation (deviation)", xscale="log", yscale="log")
        legend_outside(axis)

    text = (
        f"Each point is one of {min(len(mean), POINTS):,} units drawn at random: how far its fused importance moves "
        "from sample to sample, against the importance itself. Points that rise to the right say that what fluctuates "
        "is also important, so that removing the most volatile units first would remove vital ones."
    )
    return Figure(name=f"fluctuation-{role}", title=f"Fluctuation against importance, {role}", text=text, draw=draw)


def trail(candidates: Sequence[tuple[str, float]]) -> Figure:
    """Measured loss of every candidate of the search, best first. candidates: name, loss."""
    names, losses = zip(*candidates, strict=True)

    def draw(axis: Any) -> None:
        bars = axis.barh(range(len(names)), losses, color=[COLOURS[2], *[COLOURS[0]] * (len(names) - 1)])
        label_bars(axis, bars, [f"{loss:.3g}" for loss in losses])
        name_rows(axis, names)
        axis.grid(visible=False)
        axis.margins(x=0.1)
        scale = "log" if max(losses) > 20 * min(losses) else "linear"
        axis.set(xlabel="KL to the dense model, nats per token", xscale=scale)

    text = f"{len(names)} candidates were tried; the best is “{names[0]}” with {losses[0]:.3f} nats per token."
    return Figure(name="trail", title="Candidates of the search", text=text, draw=draw, height=rows_height(len(names)))


def accuracy(tasks: Mapping[str, Mapping[str, TaskAccuracy]]) -> Figure:
    """Accuracy with standard errors, by model and task."""
    names = list(next(iter(tasks.values())))
    width = 0.8 / len(tasks)

    def draw(axis: Any) -> None:
        for index, (model, found) in enumerate(tasks.items()):
            places = np.arange(len(names)) + (index - (len(tasks) - 1) / 2) * width
            values, errors = zip(*((found[name].acc, found[name].acc_stderr) for name in names), strict=True)
            colour = COLOURS[index % len(COLOURS)]
            axis.bar(places, values, width, yerr=errors, label=model, capsize=3, color=colour, ecolor=INK)
        axis.set_xticks(np.arange(len(names)), names)
        for place, name in enumerate(names):
            chance = next(iter(tasks.values()))[name].chance
            label = {} if place else {"label": "chance"}
            axis.plot([place - 0.45, place + 0.45], [chance, chance], linestyle=":", color=INK, **label)
        axis.grid(visible=False, axis="x")
        axis.set(ylabel="accuracy")
        legend_outside(axis)

    text = f"Accuracy of {', '.join(tasks)} on {', '.join(names)}, with standard errors; dotted: guessing."
    return Figure(name="accuracy", title="Zero-shot accuracy", text=text, draw=draw)


def speeds(models: Mapping[str, ModelSpeed]) -> Figure:
    """Tokens per second by the name of the model; the first is what the others are compared with."""
    kinds = {"reading": "prefill", "writing": "decode"}
    base = next(iter(models))

    def draw(axis: Any) -> None:
        from matplotlib.ticker import FuncFormatter

        # reading is many times quicker than writing, so each is shown relative to the first model
        for index, (model, speed) in enumerate(models.items()):
            places = np.arange(len(kinds)) + (index - (len(models) - 1) / 2) * 0.8 / len(models)
            values = [getattr(speed, kind) for kind in kinds.values()]
            shares = [value / getattr(models[base], kind) for value, kind in zip(values, kinds.values(), strict=True)]
            bars = axis.barh(places, shares, 0.8 / len(models), color=COLOURS[index % len(COLOURS)], label=model)
            label_bars(axis, bars, [f"{value:,.0f}/s" for value in values])
        name_rows(axis, list(kinds))
        axis.margins(x=0.12)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
        axis.set(xlabel=f"speed / {base}")
        legend_outside(axis)

    said = [
        f"{label}: {', '.join(f'{model} {getattr(speed, kind):,.0f}' for model, speed in models.items())}"
        for label, kind in kinds.items()
    ]
    text = f"Tokens per second. {'; '.join(said)}."
    return Figure(name="speed", title="Speed", text=text, draw=draw, height=rows_height(len(kinds) * len(models)))


def stages(costs: Sequence[StageRecord]) -> Figure:
    """Seconds and peak memory of each stage."""

    def draw(axis: Any) -> None:
        bars = axis.barh(range(len(costs)), [cost.seconds for cost in costs], color=COLOURS[0])
        labels = [f"{cost.seconds:,.1f} s, {cost.peak_resident_bytes / 1e9:.1f} GB" for cost in costs]
        label_bars(axis, bars, labels)
        name_rows(axis, [cost.name for cost in costs])
        axis.margins(x=0.22)
        axis.set(xlabel="seconds")

    total, peak = sum(cost.seconds for cost in costs), max(cost.peak_resident_bytes for cost in costs)
    text = f"{len(costs)} stages, {total:,.0f} seconds in all, never more than {peak / 1e9:.1f} GB of memory."
    title = "Time and peak memory of each stage"
    return Figure(name="stages", title=title, text=text, draw=draw, height=rows_height(len(costs)))


def losses(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Loss curves of a recovery. curves: label -> (step, loss)."""

    def draw(axis: Any) -> None:
        for index, (label, points) in enumerate(curves.items()):
            steps, values = zip(*points, strict=True)
            mark = "" if len(points) > 40 else "os"[index % 2]
            axis.plot(steps, values, f"{mark}-", color=COLOURS[index], label=label, markersize=4)
        axis.set(xlabel="step", ylabel="loss, nats per token")
        legend_outside(axis)

    text = "Loss over the steps of the recovery: " + ", ".join(
        f"{label} from {points[0][1]:.2f} to {points[-1][1]:.2f}" for label, points in curves.items()
    )
    return Figure(name="losses", title="Loss of the recovery", text=text, draw=draw)
