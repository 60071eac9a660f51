"""The figures about one pruned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saap.core.evaluation_records import ModelSpeed, TaskResult
from saap.core.manifest import StageRecord
from saap.core.records import FloatArray
from saap.reporting.figures import COLOURS, INK, Figure, caption, label_bars, name_rows, plain_ticks, rows_height
from saap.reporting.importance import Agreement, GroupView, PlanGroup

POINTS = 800
"""At most so many points in a scatter: more only make the page heavy."""
SCORES = ("vector", "element", "fused")
MARKS = "os^"


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

    least = min(groups, key=lambda group: group.kept / max(1, group.of))
    share = sum(kept) / max(1, sum(of))
    said = caption("structure", role=role, layers=len(groups), share=share, least=least)
    return Figure(name=f"structure-{role}", **said, draw=draw, height=2.8)


def importance_figures(views: Sequence[GroupView], found: Sequence[Agreement]) -> list[Figure]:
    """All figures about the scores of one role. views, found: one a layer."""
    changes = any(one["fused, not element"] is not None for one in found)
    return [
        _by_layer(views), _distribution(views), _rank_agreement(views, found),
        *([_changed_sides(views, found)] if changes else []), _fluctuation(views),
    ]  # fmt: skip


def _joined(views: Sequence[GroupView], score: str) -> Any:
    """One array of a role, (units of all layers,)."""
    return np.concatenate([getattr(view, score) for view in views])


def _by_layer(views: Sequence[GroupView]) -> Figure:
    """Median and middle 80 % of each score by layer, each score divided by its median over all layers."""
    role, layers = views[0].role, [view.layer for view in views]
    bands: dict[str, FloatArray] = {}
    for name in SCORES:
        middle = float(np.median(_joined(views, name))) or 1.0
        bands[name] = np.array([np.percentile(getattr(view, name) / middle, [10, 50, 90]) for view in views]).T

    def draw(axis: Any) -> None:
        for (name, (low, median, high)), mark, colour in zip(bands.items(), MARKS, COLOURS, strict=False):
            axis.fill_between(layers, low, high, color=colour, alpha=0.14, linewidth=0)
            axis.plot(layers, median, f"{mark}-", color=colour, label=name, markersize=3.5)
        axis.set(xlabel="layer", ylabel="importance / median", yscale="log", xlim=(-0.7, max(layers) + 0.7))
        every = np.concatenate(list(bands.values()))
        plain_ticks(axis.yaxis, max(float(every.min()), 1e-2), float(every.max()))

    return Figure(name=f"by-layer-{role}", **caption("by_layer", role=role), draw=draw)


def _distribution(views: Sequence[GroupView]) -> Figure:
    """Distributions of the scores over the units, before and after fusion, each divided by its median."""
    role = views[0].role
    positive = {name: values[values > 0] for name in SCORES if (values := _joined(views, name)).max() > 0}
    logs = {name: np.log10(values / np.median(values)) for name, values in positive.items()}

    def draw(axis: Any) -> None:
        low = min((np.percentile(values, 0.5) for values in logs.values()), default=-1.0)
        high = max((np.percentile(values, 99.5) for values in logs.values()), default=1.0)
        bins = np.linspace(low, high, 60).tolist()
        for (name, values), colour in zip(logs.items(), COLOURS, strict=False):
            axis.hist(values, bins=bins, histtype="step", color=colour, linewidth=1.6, label=name)
        axis.set(xlabel="importance / median, power of ten", ylabel="units")

    return Figure(name=f"distribution-{role}", **caption("distribution", role=role), draw=draw)


def _rank_agreement(views: Sequence[GroupView], found: Sequence[Agreement]) -> Figure:
    """Rank correlations by layer."""
    role, layers = views[0].role, [view.layer for view in views]

    def draw(axis: Any) -> None:
        for pair, mark, colour in zip(list(found[0])[:3], MARKS, COLOURS, strict=False):
            label = pair.replace(" ~", ",")
            axis.plot(layers, [one[pair] for one in found], f"{mark}-", color=colour, markersize=4, label=label)
        axis.set(xlabel="layer", ylabel="rank correlation", ylim=(None, 1.02))

    return Figure(name=f"agreement-{role}", **caption("agreement", role=role), draw=draw)


def _changed_sides(views: Sequence[GroupView], found: Sequence[Agreement]) -> Figure:
    """By layer, the share of removed units that one score alone would have kept."""
    role = views[0].role
    keys = ("fused, not vector", "fused, not element")
    changed = [(view.layer, one) for view, one in zip(views, found, strict=True) if one[keys[0]] is not None]
    layers = np.array([layer for layer, _ in changed])
    vector, element = (np.array([100 * (one[key] or 0) for _, one in changed]) for key in keys)

    def draw(axis: Any) -> None:
        axis.bar(layers - 0.2, vector, 0.4, color=COLOURS[0], label="vector alone")
        axis.bar(layers + 0.2, element, 0.4, color=COLOURS[1], label="element alone")
        axis.set(xlabel="layer", ylabel="% of the removed units")
        axis.grid(visible=False, axis="x")

    said = caption("changed", role=role, vector=vector.mean(), element=element.mean())
    return Figure(name=f"changed-{role}", **said, draw=draw, height=2.8)


def _fluctuation(views: Sequence[GroupView]) -> Figure:
    """Fluctuation against importance, removed units apart."""
    role = views[0].role
    mean, kept = _joined(views, "fused"), _joined(views, "kept")
    spread = np.sqrt(_joined(views, "fluctuation"))
    chosen = np.random.default_rng(0).permutation(len(mean))[:POINTS]

    def draw(axis: Any) -> None:
        shown = np.isin(np.arange(len(mean)), chosen) & (spread > 0) & (mean > 0)
        for stays, colour, mark, width, label in ((True, COLOURS[0], "o", 0, "kept"),
                                                  (False, COLOURS[1], "x", 0.8, "removed")):  # fmt: skip
            here = shown & (kept == stays)
            style = {"s": 9, "marker": mark, "color": colour, "alpha": 0.55, "linewidths": width}
            axis.scatter(mean[here], spread[here], label=label, **style)
        axis.set(xlabel="fused importance", ylabel="fluctuation (deviation)", xscale="log", yscale="log")

    said = caption("fluctuation", role=role, points=len(chosen))
    return Figure(name=f"fluctuation-{role}", **said, draw=draw)


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

    said = caption("trail", count=len(names), best=names[0], loss=losses[0])
    return Figure(name="trail", **said, draw=draw, height=rows_height(len(names)))


def accuracy(tasks: Mapping[str, Mapping[str, TaskResult]]) -> Figure:
    """Accuracy with standard errors, by model and task."""
    first = next(iter(tasks.values()))
    width = 0.8 / len(tasks)

    def draw(axis: Any) -> None:
        for index, (model, found) in enumerate(tasks.items()):
            places = np.arange(len(first)) + (index - (len(tasks) - 1) / 2) * width
            values, errors = zip(*((found[name].acc, found[name].acc_stderr) for name in first), strict=True)
            colour = COLOURS[index % len(COLOURS)]
            axis.bar(places, values, width, yerr=errors, label=model, capsize=3, color=colour, ecolor=INK)
        axis.set_xticks(np.arange(len(first)), list(first))
        for place, task in enumerate(first.values()):
            label = {} if place else {"label": "chance"}
            axis.plot([place - 0.45, place + 0.45], [task.chance] * 2, linestyle=":", color=INK, **label)
        axis.grid(visible=False, axis="x")
        axis.set(ylabel="accuracy")

    return Figure(name="accuracy", **caption("accuracy", models=tasks, tasks=first), draw=draw)


def speeds(models: Mapping[str, ModelSpeed]) -> Figure:
    """Tokens per second by the name of the model; the first is what the others are compared with."""
    base = next(iter(models))
    found = {phase: {name: getattr(one, phase) for name, one in models.items()} for phase in ("prefill", "decode")}

    def draw(axis: Any) -> None:
        from matplotlib.ticker import FuncFormatter

        # prefill is many times quicker than decode, so each is shown relative to the first model
        for index, model in enumerate(models):
            places = np.arange(len(found)) + (index - (len(models) - 1) / 2) * 0.8 / len(models)
            shares = [values[model] / values[base] for values in found.values()]
            bars = axis.barh(places, shares, 0.8 / len(models), color=COLOURS[index % len(COLOURS)], label=model)
            label_bars(axis, bars, [f"{values[model]:,.0f}/s" for values in found.values()])
        name_rows(axis, list(found))
        axis.margins(x=0.12)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
        axis.set(xlabel=f"speed / {base}")

    return Figure(name="speed", **caption("speeds", speeds=found), draw=draw, height=rows_height(2 * len(models)))


def stages(costs: Sequence[StageRecord]) -> Figure:
    """Seconds and peak memory of each stage."""
    memory = [cost.peak_resident_bytes / 1e9 for cost in costs]

    def draw(axis: Any) -> None:
        bars = axis.barh(range(len(costs)), [cost.seconds for cost in costs], color=COLOURS[0])
        labels = [f"{cost.seconds:,.1f} s, {size:.1f} GB" for cost, size in zip(costs, memory, strict=True)]
        label_bars(axis, bars, labels)
        name_rows(axis, [cost.name for cost in costs])
        axis.margins(x=0.22)
        axis.set(xlabel="seconds")

    seconds = sum(cost.seconds for cost in costs)
    said = caption("stages", count=len(costs), seconds=seconds, gigabytes=max(memory))
    return Figure(name="stages", **said, draw=draw, height=rows_height(len(costs)))


def losses(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Loss curves of a recovery. curves: label -> (step, loss)."""

    def draw(axis: Any) -> None:
        for (label, points), mark, colour in zip(curves.items(), MARKS, COLOURS, strict=False):
            steps, values = zip(*points, strict=True)
            style = f"{'' if len(points) > 40 else mark}-"
            axis.plot(steps, values, style, color=colour, label=label, markersize=4)
        axis.set(xlabel="step", ylabel="loss, nats per token")

    return Figure(name="losses", **caption("losses", curves=curves), draw=draw)
