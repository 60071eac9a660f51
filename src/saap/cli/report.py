"""`saap report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click
from pydantic import AfterValidator

from saap.settings.run import out_flag, with_name
from saap.settings.setting import Flag, Settings


class PageSettings(Settings):
    """Contents and destination of a page."""

    out: Annotated[
        Path | None, AfterValidator(with_name),
        out_flag("Page to write.", panel="", name="output_file", metavar="FILE", default="DIR-report.html"),
    ] = None  # fmt: skip
    evaluations: Annotated[
        tuple[Path, ...], Flag("Report of `saap eval -o FILE`, repeatable.", flag="--eval", metavar="FILE")
    ] = ()
    comparison: Annotated[
        Path | None,
        Flag("Show a pruned model versus the baselines of a `saap compare`.", flag="--compare", metavar="DIR"),
    ] = None
    figures: Annotated[
        Path | None, Flag("Also write every figure as SVG and PNG, every table as Markdown and LaTeX.", metavar="DIR")
    ] = None
    open_page: Annotated[bool, Flag("Open the page in the browser.", name="open")] = False


def report(directory: Annotated[Path, "Folder written by `saap prune` or `saap compare`."], page: PageSettings) -> None:
    """Write one self-contained HTML page about a pruned model or a comparison."""
    from saap.reporting.report import build_page, write_page

    source = Path(directory)
    folder = (source if source.is_dir() else source.parent).resolve()
    target = page.out if page.out is not None else folder.with_name(folder.name + "-report.html")
    for path in write_page(build_page(source, page.evaluations, page.comparison), target, page.figures):
        print(f"wrote {path}")
    if page.open_page:
        click.launch(str(target))
