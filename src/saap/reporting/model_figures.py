"""The figures about one pruned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saap.reporting.figures import COLOURS, INK, Figure, legend_outside, plain_ticks
from saap.reporting.importance import Agreement, GroupView, by_layer

POINTS = 800
"""At most so many points in a scatter: more only make the page heavy."""
SCORES = ("vector", "element", "fused")
ALONE = {"vector": "the coarse score (vector)", "element": "the fine score (element)"}


def structure(views: Sequence[Mapping[str, Any]], role: str) -> Figure:
    """Kept units by layer. views: `layer`, `role`, `kept`, `of`."""
    mine = [view for view in views if view["role"] == role]
    layers = [view["layer"] for view in mine]
    kept, of = [view["kept"] for view in mine], [view["of"] for view in mine]

    def draw(axis: Any) -> None:
        axis.bar(layers, of, color=COLOURS[0], alpha=0.22, label="removed")
        axis.bar(layers, kept, color=COLOURS[0], label="kept")
        axis.set(xlabel="layer", ylabel=f"{role} units", xlim=(-0.7, max(layers) + 0.7))
        axis.grid(visible=False, axis="x")
        axis.locator_params(axis="y", integer=True)
        legend_outside(axis)

    share = sum(kept) / max(1, sum(of))
    least = min(mine, key=lambda view: view["kept"] / max(1, view["of"]))
    text = (
        f"Bars of kept units in each of {len(mine)} layers. {share:.0%} of all {role} units stay; layer "
        f"{least['layer']} keeps the least, {least['kept']:,} of {least['of']:,}."
    )
    return Figure(name=f"structure-{role}", title=f"Kept {role} units by layer", text=text, draw=draw, height=2.8)


def importance_by_layer(views: Sequence[GroupView], role: str) -> Figure:
    """Median and middle 80 % of each score by layer, each score divided by its median over all layers."""
    mine = by_layer(views, role)
    layers = sorted(mine)
    ends = np.cumsum([len(mine[layer].fused) for layer in layers])[:-1]
    bands = {}
    for name in SCORES:
        values = np.concatenate([getattr(mine[layer], name) for layer in layers])
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
    return Figure(name=f"by-layer-{role}", title=f"Importance of {role} units by layer, before and after fusion",
                  text=text, draw=draw)  # fmt: skip


def importance_distribution(views: Sequence[GroupView], role: str) -> Figure:
    """Distributions of the scores over the units, before and after fusion, each divided by its median."""
    mine = list(by_layer(views, role).values())
    logs = {}
    for name in SCORES:
        values = np.concatenate([getattr(view, name) for view in mine])
        positive = values[values > 0]
        if len(positive):
            logs[name] = np.log10(positive / np.median(positive))

    def draw(axis: Any) -> None:
        low = min((np.percentile(values, 0.5) for values in logs.values()), default=-1.0)
        high = max((np.percentile(values, 99.5) for values in logs.values()), default=1.0)
        for index, (name, values) in enumerate(logs.items()):
            axis.hist(values, bins=np.linspace(low, high, 60).tolist(), histtype="step", color=COLOURS[index],
                      linewidth=1.6, label=name)  # fmt: skip
        axis.set(xlabel="importance / median, power of ten", ylabel="units")
        legend_outside(axis)

    text = (
        f"Histograms of the vector-wise, the element-wise and the fused importance of all {role} units, each divided "
        "by its median. A narrow peak means that the score tells the units little apart; the outermost 0.5 % at each "
        "end are left out."
    )
    return Figure(name=f"distribution-{role}", title=f"Distribution of the importance of {role} units", text=text,
                  draw=draw)  # fmt: skip


def rank_agreement(agreements: Mapping[int, Agreement], role: str) -> Figure:
    """Rank correlations by layer."""
    layers = sorted(agreements)
    lines = {
        "vector, element": [agreements[layer].vector_element for layer in layers],
        "vector, fused": [agreements[layer].vector_fused for layer in layers],
        "element, fused": [agreements[layer].element_fused for layer in layers],
    }

    def draw(axis: Any) -> None:
        for index, (label, values) in enumerate(lines.items()):
            axis.plot(layers, values, "os^"[index] + "-", color=COLOURS[index], markersize=4, label=label)
        axis.set(xlabel="layer", ylabel="rank correlation", ylim=(None, 1.02))
        legend_outside(axis)

    return Figure(
        name=f"agreement-{role}",
        title=f"Do the scores order the {role} units alike?",
        text="Spearman's rank correlation between two scores in each layer; 1 means the same order.",
        draw=draw,
    )


def changed_sides(agreements: Mapping[int, Agreement], role: str) -> Figure:
    """By layer, the share of removed units that one score alone would have kept."""
    layers = [layer for layer in sorted(agreements) if agreements[layer].changed is not None]
    shares = {
        "vector": [100 * (agreements[layer].changed_from_vector or 0) for layer in layers],
        "element": [100 * (agreements[layer].changed or 0) for layer in layers],
    }

    def draw(axis: Any) -> None:
        for index, (name, values) in enumerate(shares.items()):
            places = np.array(layers) + (index - 0.5) * 0.4
            axis.bar(places, values, 0.4, color=COLOURS[index], label=f"{name} alone")
        axis.set(xlabel="layer", ylabel="% of the removed units")
        axis.grid(visible=False, axis="x")
        legend_outside(axis)

    means = {name: np.mean(values) if values else 0.0 for name, values in shares.items()}
    text = (
        f"Of the units that the fused score would remove, those that one score alone would keep: on average "
        f"{means['vector']:.0f} % against {ALONE['vector']} and {means['element']:.0f} % against {ALONE['element']}."
    )
    return Figure(name=f"changed-{role}", title=f"{role} units that change sides by the fusion", text=text, draw=draw,
                  height=2.8)  # fmt: skip


def fluctuation(views: Sequence[GroupView], role: str) -> Figure:
    """Fluctuation against importance, removed units apart."""
    mine = list(by_layer(views, role).values())
    mean = np.concatenate([view.fused for view in mine])
    spread = np.sqrt(np.concatenate([view.fluctuation for view in mine]))
    kept = np.concatenate([view.kept for view in mine])
    chosen = np.random.default_rng(0).permutation(len(mean))[:POINTS]

    def draw(axis: Any) -> None:
        shown = np.isin(np.arange(len(mean)), chosen) & (spread > 0) & (mean > 0)
        for stays, colour, mark, label in ((True, COLOURS[0], "o", "kept"), (False, COLOURS[1], "x", "removed")):
            here = shown & (kept == stays)
            axis.scatter(mean[here], spread[here], s=9, marker=mark, color=colour, alpha=0.55, label=label,
                         linewidths=0 if mark == "o" else 0.8)  # fmt: skip
        axis.set(xlabel="fused importance", ylabel="fluctuation (deviation)", xscale="log", yscale="log")
        legend_outside(axis)

    text = (
        f"Each point is one of {min(len(mean), POINTS):,} units drawn at random: how far its fused importance moves "
        "from sample to sample, against the importance itself. Points that rise to the right say that what fluctuates "
        "is also important, so that removing the most volatile units first would remove vital ones."
    )
    return Figure(name=f"fluctuation-{role}", title=f"Fluctuation against importance, {role}", text=text, draw=draw)


def _bar_height(bars: int) -> float:
    return 0.9 + 0.27 * bars


def trail(candidates: Sequence[tuple[str, float]]) -> Figure:
    """Measured loss of every candidate of the search, best first. candidates: name, loss."""
    names, losses = [name for name, _ in candidates], [loss for _, loss in candidates]

    def draw(axis: Any) -> None:
        places = np.arange(len(names))
        bars = axis.barh(places, losses, color=[COLOURS[2], *[COLOURS[0]] * (len(names) - 1)])
        axis.bar_label(bars, labels=[f"{loss:.3g}" for loss in losses], padding=3, fontsize=8.5)
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.grid(visible=False)
        axis.margins(x=0.1)
        axis.set(
            xlabel="KL to the dense model, nats per token", xscale="log" if max(losses) > 20 * min(losses) else "linear"
        )

    text = f"{len(names)} candidates were tried; the best is “{names[0]}” with {losses[0]:.3f} nats per token."
    return Figure(name="trail", title="Candidates of the search", text=text, draw=draw, height=_bar_height(len(names)))


def accuracy(tasks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Accuracy with standard errors. tasks: model -> task -> acc, acc_stderr."""
    models = list(tasks)
    names = list(tasks[models[0]])
    width = 0.8 / len(models)

    def draw(axis: Any) -> None:
        for index, model in enumerate(models):
            places = np.arange(len(names)) + (index - (len(models) - 1) / 2) * width
            axis.bar(places, [tasks[model][name]["acc"] for name in names], width,
                     yerr=[tasks[model][name]["acc_stderr"] for name in names], label=model, capsize=3,
                     color=COLOURS[index % len(COLOURS)], ecolor=INK)  # fmt: skip
        axis.set_xticks(np.arange(len(names)), names)
        for place, name in enumerate(names):
            chance = tasks[models[0]][name]["chance"]
            label = {} if place else {"label": "chance"}
            axis.plot([place - 0.45, place + 0.45], [chance, chance], linestyle=":", color=INK, **label)
        axis.grid(visible=False, axis="x")
        axis.set(ylabel="accuracy")
        legend_outside(axis)

    text = f"Accuracy of {', '.join(models)} on {', '.join(names)}, with standard errors; dotted: guessing."
    return Figure(name="accuracy", title="Zero-shot accuracy", text=text, draw=draw)


def speeds(found: Mapping[str, Mapping[str, float]]) -> Figure:
    """Tokens per second. found: what was measured (reading, writing) -> model -> tokens per second."""
    kinds, models = list(found), list(next(iter(found.values())))

    def draw(axis: Any) -> None:
        from matplotlib.ticker import FuncFormatter

        # reading is many times quicker than writing, so each is shown relative to the first model
        for index, model in enumerate(models):
            places = np.arange(len(kinds)) + (index - (len(models) - 1) / 2) * 0.8 / len(models)
            shares = [found[kind][model] / found[kind][models[0]] for kind in kinds]
            bars = axis.barh(places, shares, 0.8 / len(models), color=COLOURS[index % len(COLOURS)], label=model)
            axis.bar_label(bars, labels=[f"{found[kind][model]:,.0f}/s" for kind in kinds], padding=3, fontsize=8.5)
        axis.set_yticks(np.arange(len(kinds)), kinds)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.grid(visible=False, axis="y")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
        axis.set(xlabel=f"speed / {models[0]}")
        legend_outside(axis)

    said = [f"{kind}: {', '.join(f'{model} {found[kind][model]:,.0f}' for model in models)}" for kind in kinds]
    text = f"Tokens per second. {'; '.join(said)}."
    return Figure(name="speed", title="Speed", text=text, draw=draw, height=_bar_height(len(kinds) * len(models)))


def stages(costs: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds and peak memory of each stage."""
    names = [cost["name"] for cost in costs]

    def draw(axis: Any) -> None:
        places = np.arange(len(names))
        bars = axis.barh(places, [cost["seconds"] for cost in costs], color=COLOURS[0])
        labels = [f"{cost['seconds']:,.1f} s, {cost['peak_resident_bytes'] / 1e9:.1f} GB" for cost in costs]
        axis.bar_label(bars, labels=labels, padding=3, fontsize=8.5)
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.margins(x=0.22)
        axis.grid(visible=False, axis="y")
        axis.set(xlabel="seconds")

    total = sum(cost["seconds"] for cost in costs)
    peak = max((cost["peak_resident_bytes"] for cost in costs), default=0)
    text = f"{len(names)} stages, {total:,.0f} seconds in all, never more than {peak / 1e9:.1f} GB of memory."
    return Figure(name="stages", title="Time and peak memory of each stage", text=text, draw=draw,
                  height=_bar_height(len(names)))  # fmt: skip


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
