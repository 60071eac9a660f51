"""Pages of the book: templates that take every number from the measured values."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from harness.driver import State, state_of
from harness.experiment import Experiment, Request
from saap.core.files import whole_file
from saap.reporting.figures import Figure, slug, to_svg
from saap.settings.presets import PRESETS, Preset
from saap.settings.prune import PruneConfig
from saap.settings.recover import DEFAULT_MINUTES, RecoverConfig

TEMPLATES = Path(__file__).parent / "templates"
NOTHING = "\N{EN DASH}"
LONG_DECIMAL = re.compile(r"-?\d+\.\d{3,}")


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` decimals; three significant digits if it is large, a dash if missing."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.3g}"


def percent(value: float | None, digits: int = 0) -> str:
    return NOTHING if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def interval(pair: Sequence[float], digits: int = 2) -> str:
    return f"{number(pair[0], digits)} to {number(pair[1], digits)}"


def templates() -> jinja2.Environment:
    """The environment of all templates; undefined names are errors."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters |= {"n": number, "pct": percent, "interval": interval}
    return environment


def block(experiment: Experiment, name: str, summary: Mapping[str, Any] | None = None) -> str:
    """A block of the experiment's template as one line; empty if the template has no such block.

    name: `title`, `question`, `limits`, `finding` or `decision` (for the defaults); the last two need the summary.
    """
    return " ".join(_rendered(experiment, name, summary).split())


def _rendered(experiment: Experiment, name: str, summary: Mapping[str, Any] | None) -> str:
    template = templates().get_template(f"{experiment.name}.md.jinja")
    if name not in template.blocks:
        return ""
    return "".join(template.blocks[name](template.new_context({"s": summary or {}, "defaults": product_defaults()})))


def charts(experiment: Experiment, summary: Mapping[str, Any]) -> list[Figure]:
    """The charts with the titles and texts of the block `charts`, whose lines are `NAME | TITLE | TEXT`."""
    said = [line.split(" | ") for line in _rendered(experiment, "charts", summary).splitlines()]
    drawn = {figure.name: figure for figure in experiment.figures(summary)}
    return [dataclasses.replace(drawn[slug(name)], title=title, text=text) for name, title, text in said]


def product_defaults() -> dict[str, Any]:
    """The default settings of `saap prune` and `saap recover`."""
    prune = {name: one.default for name, one in PruneConfig.model_fields.items()}
    recover = {name: one.default for name, one in RecoverConfig.model_fields.items()}
    preset = dataclasses.asdict(PRESETS[Preset.DEFAULT])
    return {"prune": prune, "recover": recover, "preset": preset, "minutes": DEFAULT_MINUTES}


def page_of(experiment: Experiment, request: Request, state: State, summary: Mapping[str, Any] | None) -> str:
    """The page of an experiment: the findings, or without a summary the missing cells."""
    said = {name: block(experiment, name) for name in ("title", "question", "limits")}
    if summary is None:
        return templates().get_template("unfinished.md.jinja").render(**said, experiment=experiment, state=state)
    template = templates().get_template(f"{experiment.name}.md.jinja")
    said |= {name: block(experiment, name, summary) for name in ("finding", "decision")}
    own = {*experiment.names(request), *experiment.extra}
    return template.render(
        **said, s=summary, experiment=experiment, figures=charts(experiment, summary),
        settings=experiment.chosen(request), environments=_environments(state), cells=len(state.found),
        missing=len(state.missing),
        undated=sum(record.get("code") is None for record in state.found.values()),
        seconds=sum(record.get("seconds") or 0.0 for name, record in state.found.items() if name in own),
    )  # fmt: skip


def _environments(state: State) -> list[str]:
    said = []
    for known in (record.get("environment") for record in state.found.values()):
        if known:
            parts = [f"{known[name]} {name}" for name in ("cores", "threads") if name in known]
            parts += [f"{name} {known[name]}" for name in ("machine", "python") if name in known]
            parts += [f"{name} {version}" for name, version in known.get("versions", {}).items()]
            said.append(", ".join(parts))
    return list(dict.fromkeys(said))


def summary_of(experiment: Experiment, state: State) -> dict[str, Any] | None:
    """The figures of an experiment's page; None if it lacks a cell, or all cells if some are enough."""
    if state.missing and not (experiment.partial and state.found):
        return None
    return dict(experiment.summarise({name: record["values"] for name, record in state.found.items()}))


Summaries = Mapping[str, Mapping[str, Any] | None]
"""By experiment; None where it lacks cells."""


def write_pages(experiments: Sequence[Experiment], request: Request, out: Path) -> Summaries:
    """The page and the charts of every experiment, and the index."""
    told, decided = {}, {}
    found: dict[str, dict[str, Any] | None] = {}
    for experiment in experiments:
        state = state_of(experiment, request)
        summary = found[experiment.name] = summary_of(experiment, state)
        write(out / f"{experiment.name}.md", page_of(experiment, request, state, summary))
        if summary is not None:
            for figure in charts(experiment, summary):
                write(out / "figures" / f"{figure.name}.svg", compact_svg(figure))
            told[experiment.name] = block(experiment, "finding", summary)
            decided[experiment.name] = block(experiment, "decision", summary)
    write(out / "index.md", index_page(experiments, told, decided, quick=request.quick))
    return found


def compact_svg(figure: Figure, ink: str = "black") -> str:
    """The SVG with coordinates rounded to a hundredth of a point."""
    return LONG_DECIMAL.sub(lambda found: f"{float(found[0]):.2f}", to_svg(figure, ink=ink))


def index_page(
    experiments: Sequence[Experiment], told: Mapping[str, str], decided: Mapping[str, str], *, quick: bool
) -> str:
    """The index. told, decided: findings and decisions by experiment; unmeasured experiments have no finding."""
    said = {"titles": {one.name: block(one, "title") for one in experiments}, "told": told, "decided": decided}
    return templates().get_template("index.md.jinja").render(said, quick=quick)


def write(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
