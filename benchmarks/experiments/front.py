"""Values of the front page: its chart and its tables, from whatever is measured of the four real models."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from harness.experiment import Request, Values, experiment
from harness.store import ROOT, finished_cells
from lab.measures import geometric_mean

from experiments.quality import comparison, models
from saap.reporting.figures import COLOURS, MARKERS, Figure, plain_ticks

OURS, LLM_PRUNER = "saap", "llm-pruner-element2@ffn"
METHODS = {
    OURS: "saap", LLM_PRUNER: "LLM-Pruner", "flap": "FLAP", "wanda-sp@ffn": "Wanda-sp",
    "block-influence": "block influence",
}  # fmt: skip
NAMES = {
    models.SMOLLM2: "SmolLM2-135M", models.GEMMA: "Gemma 3 270M", models.QWEN: "Qwen2.5-Coder 0.5B",
    models.LARGE: "Qwen2.5-Coder 1.5B",
}  # fmt: skip
OURS_RUNS = ("default", "fast")
BASELINE = {"llm-pruner": comparison.CUT, "llm-pruner-restored": comparison.RESTORED}
"""Runs of `models` with a baseline, and their states in the comparison."""
STATES = {comparison.CUT: "cut only", comparison.RESTORED: "with our reconstruction"}
RECORDING = ROOT / "docs" / "front" / "terminal.cast.gz"
"""Of the animation, made by `make animation`."""
ENDING = re.compile(r"took (\d+) s, at most ([\d.]+) GB of memory")
DODGE = 0.35
"""Distance of the methods in a panel with one pruning ratio, in percent."""
LARGEST = 50.0
"""Ratio at the upper end of the axis; larger ones are outside."""
NARROWEST = 3.5
"""A panel has room for its title: its width, in pruning ratios."""
GREY = "#888888"


class Point(NamedTuple):
    """One pruned model. removed: share of the blocks' parameters. ratio: perplexity over the dense one, WikiText-2."""

    model: str
    method: str
    restored: bool
    removed: float
    ratio: float


def cells_of(path: str, request: Request) -> dict[str, Values]:
    return {name: record["values"] for name, record in finished_cells(experiment(path), request).items()}


def points(request: Request) -> list[Point]:
    """All measured points of the chart. A model without ours or without any baseline has none.

    What the comparison lacks of a model is of the page of models.
    """
    found = [
        Point(place.model, place.method, place.state == comparison.RESTORED, float(place.ratio), cell["ratio"])
        for place, cell in _compared(request).items()
        if place.method in METHODS
    ]
    known = {(point.model, point.method, point.restored) for point in found}
    found += [one for one in _of_models(request) if (one.model, one.method, one.restored) not in known]
    both = {
        model for model in NAMES if {True, False} <= {point.method == OURS for point in found if point.model == model}
    }
    return [point for point in found if point.model in both]


def shown_in(found: Sequence[Point]) -> list[str]:
    """The models with a point, from the smallest to the largest."""
    return [model for model in NAMES if any(point.model == model for point in found)]


def _compared(request: Request) -> Mapping[comparison.Place, Values]:
    return comparison.of_first_seed(cells_of("quality.comparison", request))


def _of_models(request: Request) -> Iterable[Point]:
    removed, cells = experiment("quality.models").chosen(request)["pruning ratio"], cells_of("quality.models", request)
    for model in NAMES:
        runs, preset = _wikitext2(model, cells), _ours(model, cells)
        if preset is not None:
            yield Point(model, OURS, True, removed, runs[preset])
        for run, state in BASELINE.items():
            if run in runs:
                yield Point(model, LLM_PRUNER, state == comparison.RESTORED, removed, runs[run])


def _wikitext2(model: str, cells: Mapping[str, Values]) -> dict[str, float]:
    """The ratio of each measured run of a model. cells: of `models`."""
    return {run: cells[f"{model}/{run}"]["ratio"]["wikitext2"] for run in models.RUNS if f"{model}/{run}" in cells}


def front(request: Request) -> dict[str, Any]:
    """What the templates of the front page read."""
    at = _at(request)
    compared = [row["model"] for row in at]
    return {
        "points": points(request), "missing": [name for name in NAMES.values() if name not in compared],
        "removed": experiment("quality.models").chosen(request)["pruning ratio"], "at": at, "runs": _runs(request),
        "smallest": NAMES[models.SMOLLM2], "session": session(), "largest": LARGEST, "kinds": _by_kind(request),
    }  # fmt: skip


def _at(request: Request) -> list[Values]:
    """Ours and LLM-Pruner with 20 % removed, of each model where both are measured: of the comparison, or of `models`.

    ours: by preset, or '' in the comparison, whose reconstruction is the same for all methods. baselines: by state.
    """
    compared, cells, found = _compared(request), cells_of("quality.models", request), list[Values]()
    for model, name in NAMES.items():
        ours, theirs = (_states(model, method, compared) for method in (OURS, LLM_PRUNER))
        if comparison.RESTORED in ours and theirs:
            presets = {"": ours[comparison.RESTORED]}
        else:
            runs = _wikitext2(model, cells)
            presets = {run: runs[run] for run in OURS_RUNS if run in runs}
            theirs = {state: runs[run] for run, state in BASELINE.items() if run in runs}
        if presets and theirs:
            baselines = [(STATES[state], ratio) for state, ratio in theirs.items()]
            found.append({"model": name, "ours": presets, "baselines": baselines})
    return found


def _by_kind(request: Request) -> list[Values]:
    """For each model with both in one preset, our perplexity over LLM-Pruner's, reconstructed alike, on all texts."""
    cells, found = cells_of("quality.models", request), list[Values]()
    for model, name in NAMES.items():
        ours, theirs = (cells.get(f"{model}/{run}") for run in ("fast", "llm-pruner-restored"))
        if ours is not None and theirs is not None:
            quotients = [
                ours[part][text] / theirs[part][text]
                for part in ("ratio", "kinds") for text in ours[part].keys() & theirs[part].keys()
            ]  # fmt: skip
            found.append({
                "model": name, "texts": len(quotients), "least": min(quotients), "most": max(quotients),
                "mean": geometric_mean(quotients),
            })  # fmt: skip
    return found


def _states(model: str, method: str, compared: Mapping[comparison.Place, Values]) -> dict[str, float]:
    """The ratio of a method in each state that is measured, with 20 % removed."""
    places = {state: comparison.Place(model, method, comparison.RATIOS[0], state) for state in STATES}
    return {state: compared[place]["ratio"] for state, place in places.items() if place in compared}


def _ours(model: str, cells: Mapping[str, Any]) -> str | None:
    """The preset of ours that is measured of a model."""
    return next((run for run in OURS_RUNS if f"{model}/{run}" in cells), None)


def _runs(request: Request) -> list[Values]:
    """One run of each model, with time and memory. busy: whether the machine had other work.

    minutes: of the processor where that was measured; None for a run that was suspended.
    """
    cells = finished_cells(experiment("quality.models"), request)
    found: list[Values] = []
    for model, name in NAMES.items():
        preset = _ours(model, cells)
        if preset is not None:
            values, machine = (cells[f"{model}/{preset}"][part] for part in ("values", "environment"))
            found.append({
                "model": name, "preset": preset, "wikitext2": values["ratio"]["wikitext2"],
                "bundled": values["bundled"], "minutes": models.minutes(values),
                "memory": values["peak_resident_bytes"] / 1e9,
                "busy": "processor_seconds" not in values and machine["load"] > 1.5 * machine["cores"],
            })  # fmt: skip
    return found


def session() -> Values | None:
    """The recorded run of the animation: its command, and the time and memory that it printed."""
    if not RECORDING.is_file():
        return None
    head, *events = gzip.decompress(RECORDING.read_bytes()).decode().splitlines()
    ending = ENDING.search("".join(json.loads(event)[2] for event in events))
    if ending is None:
        raise ValueError(f"{RECORDING.name} does not end with the time of the run")
    return {"command": json.loads(head)["command"], "seconds": float(ending[1]), "memory": ending[2]}


def quality(found: Sequence[Point]) -> Figure:
    """Perplexity against the removed share: a panel for each model, filled markers where it was reconstructed."""

    def draw(axis: Any) -> None:
        canvas = axis.figure
        axis.remove()
        shown = shown_in(found)
        removed = {model: sorted({100 * point.removed for point in found if point.model == model}) for model in shown}
        widths = [max(NARROWEST, len(places) + 1) for places in removed.values()]
        panels = canvas.subplots(1, len(shown), sharey=True, squeeze=False, width_ratios=widths)[0]
        for panel, model in zip(panels, shown, strict=True):
            _draw_panel(panel, [point for point in found if point.model == model], removed[model])
            panel.set_title(NAMES[model], fontsize=9.5)
        panels[0].set_ylabel("perplexity / dense")
        canvas.supxlabel("% of the decoder blocks' parameters removed", fontsize=9.5)
        canvas.legend(handles=_legend(), loc="outside upper center", ncols=4, fontsize=9)

    text = "Perplexity of the pruned over that of the dense model against the removed share, by model and method."
    return Figure(name="quality", title="Quality against size", text=text, draw=draw, height=4.0)


def _draw_panel(panel: Any, found: Sequence[Point], removed: Sequence[float]) -> None:
    for index, method in enumerate(METHODS):
        shift = (index - (len(METHODS) - 1) / 2) * DODGE if len(removed) == 1 else 0.0
        for restored in (False, True):
            mine = sorted((p.removed, p.ratio) for p in found if (p.method, p.restored) == (method, restored))
            places = [100 * place + shift for place, _ in mine]
            panel.plot(places, [ratio for _, ratio in mine], **_look(index, restored))
    panel.set_yscale("log")
    plain_ticks(panel.yaxis, 1.0, LARGEST)
    panel.set_ylim(0.9, LARGEST)  # a single one of a million would leave no room for the others
    panel.set_xticks(removed, [f"{place:g}" for place in removed])
    panel.margins(x=0.15)
    if len(removed) == 1:
        panel.set_xlim(removed[0] - 6 * DODGE, removed[0] + 6 * DODGE)


def _look(index: int, restored: bool) -> Mapping[str, Any]:
    colour, face = COLOURS[index], COLOURS[index] if restored else "none"
    return {
        "color": colour, "marker": MARKERS[index], "linestyle": "-" if restored else ":", "markerfacecolor": face,
        "linewidth": 2.2 if index == 0 else 1.2, "markersize": 6, "zorder": 3 if index == 0 else 2,
    }  # fmt: skip


def _legend() -> list[Any]:
    """Handles of the methods, and of what filled and hollow markers mean."""
    from matplotlib.lines import Line2D

    methods = [Line2D([], [], label=name, **_look(index, True)) for index, name in enumerate(METHODS.values())]
    states = {"with our reconstruction": True, "cut only": False}
    methods.append(Line2D([], [], linestyle="", label=" "))  # so that the states have a column of their own
    for label, filled in states.items():
        look = {**_look(0, filled), "color": GREY, "linewidth": 1.2, "markerfacecolor": GREY if filled else "none"}
        methods.append(Line2D([], [], label=label, **look))
    return methods
