"""The figures about one pruned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saap.core.errors import printable
from saap.core.evaluation_records import ModelSpeed, TaskResult
from saap.core.manifest import KindChange, StageRecord
from saap.core.records import FloatArray
from saap.reporting.figures import COLOURS, INK, Figure, label_bars, name_rows, plain_ticks
from saap.reporting.importance import ModuleScores, PlanGroup

POINTS = 800
"""Maximum number of points in a scatter plot, to limit the size of the page."""
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
    said = {"role": role, "layers": len(groups), "share": sum(kept) / max(1, sum(of)), "least": least}
    return Figure.of(f"structure-{role}", "structure", draw, height=2.8, said=said)


def kinds(changes: Sequence[KindChange]) -> Figure:
    """Perplexity of the pruned relative to the dense model on each kind of text."""

    def draw(axis: Any) -> None:
        bars = axis.barh(range(len(changes)), [one.ratio for one in changes], color=COLOURS[0])
        label_bars(axis, bars, [f"{one.ratio:.2f}" for one in changes])
        name_rows(axis, [one.text for one in changes])
        axis.axvline(1, color=INK, linewidth=0.8)
        axis.margins(x=0.12)
        axis.set(xlabel="perplexity / that of the dense model")

    ordered = sorted(changes, key=lambda one: one.ratio)
    return Figure.of("kinds", "kinds", draw, rows=len(changes), said={"best": ordered[0], "worst": ordered[-1]})


def importance_figures(role: str, modules: Sequence[ModuleScores]) -> list[Figure]:
    """All figures about the scores of one role, one module per layer."""
    layers = [module.layer for module in modules]
    joined = {
        name: np.concatenate([getattr(module, name) for module in modules]) for name in (*SCORES, "fluctuation", "kept")
    }
    return [
        _by_layer(role, layers, modules, joined), _distribution(role, joined), _rank_agreement(role, layers, modules),
        *_changed_sides(role, modules), _fluctuation(role, joined),
    ]  # fmt: skip


def _by_layer(
    role: str, layers: Sequence[int], modules: Sequence[ModuleScores], joined: Mapping[str, FloatArray]
) -> Figure:
    """Median and middle 80 % of each score by layer, each score divided by its median over all layers."""
    bands: dict[str, FloatArray] = {}
    for name in SCORES:
        middle = float(np.median(joined[name])) or 1.0
        bands[name] = np.array([np.percentile(getattr(one, name) / middle, [10, 50, 90]) for one in modules]).T

    def draw(axis: Any) -> None:
        for (name, (low, median, high)), mark, colour in zip(bands.items(), MARKS, COLOURS, strict=False):
            axis.fill_between(layers, low, high, color=colour, alpha=0.14, linewidth=0)
            axis.plot(layers, median, f"{mark}-", color=colour, label=name, markersize=3.5)
        axis.set(xlabel="layer", ylabel="importance / median", yscale="log", xlim=(-0.7, max(layers) + 0.7))
        every = np.concatenate(list(bands.values()))
        plain_ticks(axis.yaxis, max(float(every.min()), 1e-2), float(every.max()))

    return Figure.of(f"by-layer-{role}", "by_layer", draw, said={"role": role})


def _distribution(role: str, joined: Mapping[str, FloatArray]) -> Figure:
    positive = {name: values[values > 0] for name in SCORES if (values := joined[name]).max() > 0}
    logs = {name: np.log10(values / np.median(values)) for name, values in positive.items()}

    def draw(axis: Any) -> None:
        low = min((np.percentile(values, 0.5) for values in logs.values()), default=-1.0)
        high = max((np.percentile(values, 99.5) for values in logs.values()), default=1.0)
        bins = np.linspace(low, high, 60).tolist()
        for (name, values), colour in zip(logs.items(), COLOURS, strict=False):
            axis.hist(values, bins=bins, histtype="step", color=colour, linewidth=1.6, label=name)
        axis.set(xlabel="importance / median, power of ten", ylabel="units")

    return Figure.of(f"distribution-{role}", "distribution", draw, said={"role": role})


def _rank_agreement(role: str, layers: Sequence[int], modules: Sequence[ModuleScores]) -> Figure:
    def draw(axis: Any) -> None:
        for pair, mark, colour in zip(list(modules[0].agreement)[:3], MARKS, COLOURS, strict=False):
            values = [module.agreement[pair] for module in modules]
            axis.plot(layers, values, f"{mark}-", color=colour, markersize=4, label=pair.replace(" ~", ","))
        axis.set(xlabel="layer", ylabel="rank correlation", ylim=(None, 1.02))

    return Figure.of(f"agreement-{role}", "agreement", draw, said={"role": role})


def _changed_sides(role: str, modules: Sequence[ModuleScores]) -> list[Figure]:
    """Share of removed units that one score alone would keep, by layer; nothing if none is removed."""
    pruned = [module for module in modules if not module.kept.all()]
    layers = np.array([module.layer for module in pruned])
    shares = {
        name: np.array([100 * (module.agreement[f"fused, not {name}"] or 0) for module in pruned])
        for name in ("vector", "element")
    }

    def draw(axis: Any) -> None:
        for (name, values), side, colour in zip(shares.items(), (-0.2, 0.2), COLOURS, strict=False):
            axis.bar(layers + side, values, 0.4, color=colour, label=f"{name} alone")
        axis.set(xlabel="layer", ylabel="% of the removed units")
        axis.grid(visible=False, axis="x")

    said = {"role": role, **{name: values.mean() for name, values in shares.items()}} if pruned else {}
    return [Figure.of(f"changed-{role}", "changed", draw, height=2.8, said=said)] if pruned else []


def _fluctuation(role: str, joined: Mapping[str, FloatArray]) -> Figure:
    mean, kept, spread = joined["fused"], joined["kept"], np.sqrt(joined["fluctuation"])
    chosen = np.random.default_rng(0).permutation(len(mean))[:POINTS]

    def draw(axis: Any) -> None:
        shown = np.isin(np.arange(len(mean)), chosen) & (spread > 0) & (mean > 0)
        for stays, colour, mark, width, label in ((True, COLOURS[0], "o", 0, "kept"),
                                                  (False, COLOURS[1], "x", 0.8, "removed")):  # fmt: skip
            here = shown & (kept == stays)
            style = {"s": 9, "marker": mark, "color": colour, "alpha": 0.55, "linewidths": width}
            axis.scatter(mean[here], spread[here], label=label, **style)
        axis.set(xlabel="fused importance", ylabel="fluctuation (deviation)", xscale="log", yscale="log")

    return Figure.of(f"fluctuation-{role}", "fluctuation", draw, said={"role": role, "points": len(chosen)})


def trail(candidates: Sequence[tuple[str, float]]) -> Figure:
    """Measured loss of every candidate of the search, the chosen one first. candidates: name, loss."""
    names, losses = zip(*candidates, strict=True)

    def draw(axis: Any) -> None:
        bars = axis.barh(range(len(names)), losses, color=[COLOURS[2], *[COLOURS[0]] * (len(names) - 1)])
        label_bars(axis, bars, [f"{loss:.3g}" for loss in losses])
        name_rows(axis, names)
        axis.grid(visible=False)
        axis.margins(x=0.1)
        scale = "log" if max(losses) > 20 * min(losses) else "linear"
        axis.set(xlabel="KL to the dense model, nats per token", xscale=scale)

    said = {"count": len(names), "best": names[0], "loss": losses[0]}
    return Figure.of("trail", "trail", draw, rows=len(names), said=said)


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
        axis.set_xticks(np.arange(len(first)), list(map(printable, first)))
        for place, task in enumerate(first.values()):
            label = {} if place else {"label": "chance"}
            axis.plot([place - 0.45, place + 0.45], [task.chance] * 2, linestyle=":", color=INK, **label)
        axis.grid(visible=False, axis="x")
        axis.set(ylabel="accuracy")

    return Figure.of("accuracy", "accuracy", draw, said={"models": tasks, "tasks": first})


def speeds(models: Mapping[str, ModelSpeed]) -> Figure:
    """Tokens per second by model; the first model is the baseline."""
    base = next(iter(models))
    found = {phase: {name: getattr(one, phase) for name, one in models.items()} for phase in ("prefill", "decode")}

    def draw(axis: Any) -> None:
        # prefill is much faster than decode, so each is shown relative to the first model
        for index, model in enumerate(models):
            places = np.arange(len(found)) + (index - (len(models) - 1) / 2) * 0.8 / len(models)
            shares = [values[model] / values[base] for values in found.values()]
            bars = axis.barh(places, shares, 0.8 / len(models), color=COLOURS[index % len(COLOURS)], label=model)
            label_bars(axis, bars, [f"{values[model]:,.0f}/s" for values in found.values()])
        name_rows(axis, list(found))
        axis.margins(x=0.12)
        axis.xaxis.set_major_formatter("{x:g} x")
        axis.set(xlabel=f"speed / {base}")

    return Figure.of("speed", "speeds", draw, rows=2 * len(models), said={"speeds": found})


def stages(costs: Sequence[StageRecord]) -> Figure:
    """Seconds and peak memory of each stage."""
    seconds, memory = zip(*((cost.seconds, cost.peak_resident_bytes / 1e9) for cost in costs), strict=True)

    def draw(axis: Any) -> None:
        bars = axis.barh(range(len(costs)), seconds, color=COLOURS[0])
        label_bars(axis, bars, [f"{time:,.1f} s, {size:.1f} GB" for time, size in zip(seconds, memory, strict=True)])
        name_rows(axis, [cost.name for cost in costs])
        axis.margins(x=0.22)
        axis.set(xlabel="seconds")

    said = {"count": len(costs), "seconds": sum(seconds), "gigabytes": max(memory)}
    return Figure.of("stages", "stages", draw, rows=len(costs), said=said)


def losses(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Loss curves of a recovery. curves: label -> (step, loss)."""

    def draw(axis: Any) -> None:
        for (label, points), mark, colour in zip(curves.items(), MARKS, COLOURS, strict=False):
            steps, values = zip(*points, strict=True)
            style = f"{'' if len(points) > 40 else mark}-"
            axis.plot(steps, values, style, color=colour, label=label, markersize=4)
        axis.set(xlabel="step", ylabel="loss, nats per token")

    return Figure.of("losses", "losses", draw, said={"curves": curves})
