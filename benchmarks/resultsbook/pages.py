"""The pages of the book: every number comes from the measured values, through a template."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from resultsbook.driver import State, state_of
from resultsbook.row import Request, Row
from resultsbook.store import write_json
from saap.core.files import whole_file
from saap.reporting.figures import Figure, to_svg
from saap.settings.prune import EFFORTS, Effort, PruneConfig
from saap.settings.recover import DEFAULT_MINUTES, RecoverConfig

TEMPLATES = Path(__file__).parent / "templates"
NOTHING = "\N{EN DASH}"


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals; of three significant digits where it is large, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.3g}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage."""
    return NOTHING if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def interval(pair: Sequence[float], digits: int = 2) -> str:
    """An interval."""
    return f"{number(pair[0], digits)} to {number(pair[1], digits)}"


def table(rows: Sequence[Sequence[object]], headings: Sequence[str]) -> str:
    """Rows as a Markdown table; numbers get three decimals."""
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    lines += ["| " + " | ".join(number(c) if isinstance(c, float) else str(c) for c in row) + " |" for row in rows]
    return "\n".join(lines)


def templates() -> jinja2.Environment:
    """The environment of all templates; a name that is not there is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"n": number, "pct": percent, "interval": interval, "table": table}
    return environment


def finding(row: Row, summary: Mapping[str, Any]) -> str:
    """The sentence that answers the question, from its template."""
    return _block(row, "finding", summary)


def decision(row: Row, summary: Mapping[str, Any]) -> str:
    """What the product's defaults take from the finding, from its template; empty where they take nothing."""
    return _block(row, "decision", summary)


def _block(row: Row, name: str, summary: Mapping[str, Any]) -> str:
    template = templates().get_template(f"{row.name}.md.jinja")
    if name not in template.blocks:
        return ""
    context = template.new_context({"s": summary, "defaults": product_defaults()})
    return " ".join("".join(template.blocks[name](context)).split())


def product_defaults() -> dict[str, Any]:
    """The settings of `saap prune` and `saap recover` for which nothing is said, as the program has them."""
    prune = {name: one.default for name, one in PruneConfig.model_fields.items()}
    recover = {name: one.default for name, one in RecoverConfig.model_fields.items()}
    effort = dataclasses.asdict(EFFORTS[Effort.DEFAULT])
    return {"prune": prune, "recover": recover, "effort": effort, "minutes": DEFAULT_MINUTES}


def row_page(row: Row, request: Request, state: State, summary: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    """The page of a row that has been measured."""
    return (
        templates()
        .get_template(f"{row.name}.md.jinja")
        .render(
            s=summary,
            row=row,
            finding=finding(row, summary),
            decision=decision(row, summary),
            figures=figures,
            settings={} if row.experiment is None else row.experiment.settings(request),
            environments=_environments(state.found),
            seconds=sum(record.get("seconds", 0.0) for record in state.found.values() if isinstance(record, dict)),
        )
    )


def _environments(found: Mapping[str, Any]) -> list[str]:
    """What is known of the machines that measured, each once."""
    said = []
    for record in found.values():
        known = record.get("environment") if isinstance(record, dict) else None
        if known:
            versions = known.get("versions", {})
            parts = [f"{known[name]} {name}" for name in ("cores", "threads") if name in known]
            parts += [f"{name} {known[name]}" for name in ("machine", "python") if name in known]
            parts += [f"{name} {version}" for name, version in versions.items()]
            said.append(", ".join(parts))
    return list(dict.fromkeys(said))


def unfinished_page(row: Row, state: State) -> str:
    """The page of a row of which something lacks."""
    return templates().get_template("unfinished.md.jinja").render(row=row, state=state)


def summary_of(row: Row, state: State) -> dict[str, Any]:
    """The figures of a row's page."""
    cells = {name: record["values"] for name, record in state.found.items()} if row.experiment else state.found
    return row.summarise(cells)


def write_pages(rows: Sequence[Row], request: Request, out: Path) -> None:
    """The page, the figures and the JSON of every row, and the index."""
    told, decided = {}, {}
    for row in rows:
        state = state_of(row, request, out)
        if not state.complete:
            _write(out / f"{row.name}.md", unfinished_page(row, state))
            continue
        summary = summary_of(row, state)
        figures = row.figures(summary)
        write_json(out / f"{row.name}.json", {"row": row.name, "question": row.question, "summary": summary})
        for figure in figures:
            _write(out / "figures" / f"{figure.name}.svg", to_svg(figure, ink="black"))
        _write(out / f"{row.name}.md", row_page(row, request, state, summary, figures))
        told[row.name] = finding(row, summary)
        decided[row.name] = decision(row, summary)
    _write(out / "index.md", index_page(rows, told, decided, request))


def index_page(rows: Sequence[Row], told: Mapping[str, str], decided: Mapping[str, str], request: Request) -> str:
    """All questions with their findings, and the defaults that follow them.

    told, decided: findings and decisions by row; rows without a finding have not been measured.
    """
    template = templates().get_template("index.md.jinja")
    return template.render(rows=rows, told=told, decided=decided, quick=request.quick)


def _write(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
