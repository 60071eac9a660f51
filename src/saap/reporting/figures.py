"""Figures as matplotlib draws them, for the page (SVG that follows the page's colours) and for files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saap.errors import EvaluationError
from saap.reporting.importance import GroupView, by_layer
from saap.reporting.tables import merged_over_seeds, short

INK = "#010203"
"""Stands for the text colour of the page: replaced by `currentColor` in the page, by black in files."""
COLOURS = ("#3b76c4", "#d9742b", "#2f9e6e", "#b0529e", "#8a8f25", "#c94f4f", "#5aa7b8", "#7a5fc0", "#96744a", "#777777")
SIZE = (7.2, 3.4)
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "saap", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "legend.frameon": False, "figure.constrained_layout.use": True,
    "savefig.transparent": True,
}  # fmt: skip
POINTS = 1500
"""At most so many points in a scatter: more only make the page heavy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure. draw: onto a matplotlib axis. text: what it shows, in words, for those who cannot see it."""

    name: str
    title: str
    text: str
    draw: Callable[[Any], None]
    height: float = SIZE[1]


@contextmanager
def _canvas(figure: Figure) -> Iterator[Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise EvaluationError(
            "figures need matplotlib, which is not installed", "Run `pip install 'saap[report]'`"
        ) from error
    with rc_context(STYLE):
        canvas = Canvas(figsize=(SIZE[0], figure.height))
        figure.draw(canvas.subplots())
        yield canvas


def to_svg(figure: Figure, *, ink: str = "currentColor") -> str:
    """The figure as an <svg> element with a title and a description that screen readers say. ink: of its text."""
    content = io.StringIO()
    with _canvas(figure) as canvas:
        canvas.savefig(content, format="svg", metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, ink)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # ids are only unique inside one figure
    svg = re.sub(r'(id="|xlink:href="#|url\(#)', lambda found: f"{found[1]}{figure.name}-", svg)
    head, _, body = svg.partition(">")
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-labelledby="{figure.name}-caption">{body}'


def write_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Each figure as SVG and PNG. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures:
        svg = folder / f"{figure.name}.svg"
        svg.write_text(to_svg(figure, ink="black"), encoding="utf-8")
        png = folder / f"{figure.name}.png"
        with _canvas(figure) as canvas:
            canvas.savefig(png, format="png", dpi=200, transparent=False, facecolor="white")
        paths += [svg, png]
    return paths


def structure(views: Sequence[Mapping[str, Any]], role: str) -> Figure:
    """Kept units by layer. views: `layer`, `role`, `kept`, `of`."""
    mine = [view for view in views if view["role"] == role]
    layers = [view["layer"] for view in mine]
    kept, of = [view["kept"] for view in mine], [view["of"] for view in mine]

    def draw(axis: Any) -> None:
        axis.bar(layers, of, color=COLOURS[0], alpha=0.25, label="removed")
        axis.bar(layers, kept, color=COLOURS[0], label="kept")
        axis.set(xlabel="layer", ylabel="units")
        axis.locator_params(axis="y", integer=True)
        axis.legend(ncols=2, loc="upper right", bbox_to_anchor=(1, 1.15))

    share = sum(kept) / max(1, sum(of))
    text = f"Bars of kept units in each of {len(mine)} layers; {share:.0%} of all {role} units stay."
    return Figure(name=f"structure-{role}", title=f"Kept {role} units by layer", text=text, draw=draw)


def importance_distribution(views: Sequence[GroupView], role: str) -> Figure:
    """Distributions of the scores over the units, before and after fusion, each divided by its median."""
    mine = list(by_layer(views, role).values())

    logs = {}
    for name in ("vector", "element", "fused"):
        values = np.concatenate([getattr(view, name) for view in mine])
        # the logarithms of the uncertainties shift whole modules: from the least, scores of all kinds start at 0
        values = values - min(0.0, float(values.min()))
        positive = values[values > 0]
        if len(positive):
            logs[name] = np.log10(positive / np.median(positive))

    def draw(axis: Any) -> None:
        low = min((np.percentile(values, 1) for values in logs.values()), default=-1.0)
        high = max((float(values.max()) for values in logs.values()), default=1.0)
        for index, (name, values) in enumerate(logs.items()):
            axis.hist(values, bins=np.linspace(low, high, 50).tolist(), histtype="step", color=COLOURS[index],
                      linewidth=1.6, label=name)  # fmt: skip
        axis.set(xlabel="log10 of importance / median", ylabel="units")
        axis.legend()

    text = "Histograms of vector-wise, element-wise and fused importance over all units, each divided by its median."
    return Figure(name=f"distribution-{role}", title=f"Importance of {role} units, before and after fusion", text=text,
                  draw=draw)  # fmt: skip


def fluctuation(views: Sequence[GroupView], role: str) -> Figure:
    """Fluctuation against importance, removed units apart."""
    mine = list(by_layer(views, role).values())
    mean = np.concatenate([view.fused for view in mine])
    spread = np.sqrt(np.concatenate([view.fluctuation for view in mine]))
    kept = np.concatenate([view.kept for view in mine])
    chosen = np.random.default_rng(0).permutation(len(mean))[:POINTS]

    def draw(axis: Any) -> None:
        shown = np.isin(np.arange(len(mean)), chosen) & (spread > 0) & (mean > mean.min())
        for stays, colour, label in ((True, COLOURS[0], "kept"), (False, COLOURS[1], "removed")):
            here = shown & (kept == stays)
            axis.scatter(mean[here] - mean.min(), spread[here], s=6, color=colour, alpha=0.6, label=label, linewidths=0)
        axis.set(
            xlabel="fused importance above the least", ylabel="fluctuation (deviation)", xscale="log", yscale="log"
        )
        axis.legend()

    text = (
        f"Each point is one of {min(len(mean), POINTS)} units: fluctuation over the samples against fused importance."
    )
    return Figure(name=f"fluctuation-{role}", title=f"Fluctuation against importance, {role}", text=text, draw=draw)


def rank_agreement(agreements: Mapping[int, tuple[float, float]], role: str) -> Figure:
    """Rank correlations by layer. agreements: layer -> (vector and element, element and fused)."""
    layers = sorted(agreements)

    def draw(axis: Any) -> None:
        for index, label in enumerate(("vector and element", "element and fused")):
            axis.plot(layers, [agreements[layer][index] for layer in layers], "o-", color=COLOURS[index], markersize=4,
                      label=label)  # fmt: skip
        axis.set(xlabel="layer", ylabel="rank correlation", ylim=(None, 1.02))
        axis.legend()

    return Figure(
        name=f"agreement-{role}",
        title=f"Do the scores order the {role} units alike?",
        text="Spearman's rank correlation between the scores in each layer; 1 means the same order.",
        draw=draw,
    )


def trail(candidates: Sequence[Mapping[str, Any]]) -> Figure:
    """Measured loss of every candidate of the search, best first."""
    names = [candidate["name"] for candidate in candidates]
    losses = [candidate["loss"] for candidate in candidates]

    def draw(axis: Any) -> None:
        places = np.arange(len(names))
        axis.barh(places, losses, color=[COLOURS[2], *[COLOURS[0]] * (len(names) - 1)])
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.set(
            xlabel="KL to the dense model, nats per token", xscale="log" if max(losses) > 20 * min(losses) else "linear"
        )

    text = f"{len(names)} candidates; the best is {names[0]} with {losses[0]:.3f} nats per token."
    return Figure(name="trail", title="Candidates of the search", text=text, draw=draw, height=1 + 0.27 * len(names))


def perplexity_by_ratio(comparison: Mapping[str, Any], text: str, restored: bool) -> Figure:
    """Perplexity over dense against the pruning ratio, one line a method."""
    entries = [entry for entry in merged_over_seeds(comparison["rows"]) if entry["restored"] is restored]
    methods = list(dict.fromkeys(entry["method"] for entry in entries))

    def draw(axis: Any) -> None:
        for index, method in enumerate(methods):
            mine = sorted((entry for entry in entries if entry["method"] == method), key=lambda entry: entry["ratio"])
            points = [
                (entry["ratio"], np.array([row["ratios"][text] for row in entry["rows"] if row["ratios"][text]]))
                for entry in mine
            ]
            points = [(ratio, values) for ratio, values in points if len(values)]
            axis.errorbar(
                [ratio for ratio, _ in points], [values.mean() for _, values in points],
                yerr=[values.std(ddof=1) if len(values) > 1 else 0 for _, values in points],
                marker="o", markersize=4, color=COLOURS[index % len(COLOURS)], label=method, capsize=2,
                linewidth=2.4 if method == "saap" else 1.3,
            )  # fmt: skip
        axis.set(xlabel="fraction of the blocks' parameters removed", ylabel="perplexity / dense", yscale="log")
        axis.legend(fontsize=8, ncols=2)

    with_restoration = "with restoration by saap" if restored else "without restoration"
    return Figure(
        name=f"ratio-{'restored' if restored else 'cut'}-{re.sub(r'[^A-Za-z0-9]+', '-', short(text))}",
        title=f"{short(text)}: perplexity by pruning ratio, {with_restoration}",
        text=f"Lines of {len(methods)} methods; the table below has the numbers.",
        draw=draw,
        height=4.2,
    )


def accuracy(tasks: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Accuracy with standard errors. tasks: model -> task -> acc, acc_stderr."""
    models = list(tasks)
    names = list(tasks[models[0]])
    width = 0.8 / len(models)

    def draw(axis: Any) -> None:
        for index, model in enumerate(models):
            places = np.arange(len(names)) + (index - (len(models) - 1) / 2) * width
            axis.bar(places, [tasks[model][name]["acc"] for name in names], width,
                     yerr=[tasks[model][name]["acc_stderr"] for name in names], label=model, capsize=2,
                     color=COLOURS[index % len(COLOURS)], ecolor=INK)  # fmt: skip
        axis.set_xticks(np.arange(len(names)), names)
        chances = [tasks[models[0]][name]["chance"] for name in names]
        for place, chance in enumerate(chances):
            axis.plot([place - 0.42, place + 0.42], [chance, chance], linestyle=":", color=INK)
        axis.set(ylabel="accuracy (dotted: chance)")
        axis.legend(fontsize=8)

    text = f"Accuracy of {', '.join(models)} on {', '.join(names)}, with standard errors."
    return Figure(name="accuracy", title="Zero-shot tasks", text=text, draw=draw)


def stages(costs: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds of each stage."""
    names = [cost["name"] for cost in costs]

    def draw(axis: Any) -> None:
        places = np.arange(len(names))
        axis.barh(places, [cost["seconds"] for cost in costs], color=COLOURS[0])
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.set(xlabel="seconds")

    total = sum(cost["seconds"] for cost in costs)
    text = f"{len(names)} stages, {total:.0f} seconds in all."
    return Figure(name="stages", title="Time of each stage", text=text, draw=draw, height=1 + 0.27 * len(names))


def losses(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Loss curves of a recovery. curves: label -> (step, loss)."""

    def draw(axis: Any) -> None:
        for index, (label, points) in enumerate(curves.items()):
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, color=COLOURS[index], label=label)
        axis.set(xlabel="step", ylabel="loss, nats per token")
        axis.legend()

    text = "Loss over the steps of the recovery: " + ", ".join(
        f"{label} from {points[0][1]:.2f} to {points[-1][1]:.2f}" for label, points in curves.items()
    )
    return Figure(name="losses", title="Recovery", text=text, draw=draw)
