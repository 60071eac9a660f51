"""`saap report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `saap prune` or `saap compare` wrote.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Page to write. [default: DIR-report.html]")] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option("--eval", metavar="FILE", help="Report of `saap eval --out`, repeatable.")
    ] = None,
    comparison: Annotated[
        Path | None,
        typer.Option("--compare", metavar="DIR", help="Show the baselines of a `saap compare` beside a pruned model."),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write every figure as SVG and PNG, every table as Markdown and LaTeX."),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Write one self-contained HTML page about a pruned model or a comparison."""
    from saap.reporting.report import build_page, write_page

    folder = source if source.is_dir() else source.parent
    target = out if out is not None else folder.absolute().with_name(folder.absolute().name + "-report.html")
    written = write_page(build_page(source, evaluation or (), comparison), target, figures)
    for path in written:
        typer.echo(f"wrote {path}")
    if open_page:
        typer.launch(str(target))
