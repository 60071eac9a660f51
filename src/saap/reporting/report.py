"""`saap report`: one page about a pruned model or a comparison, with reports of `saap eval`.

The files are untrusted: all shown values are checked for type and size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from saap.core.errors import EvaluationError, OutputError
from saap.core.evaluation_records import COMPARISON, Comparison, EvalReport
from saap.core.manifest import read_manifest
from saap.core.storage import faults_of, write_whole
from saap.reporting.comparison_page import comparison_page
from saap.reporting.figures import slug, write_figures
from saap.reporting.model_page import model_page
from saap.reporting.page import Page, render
from saap.reporting.tables import numbered, write_table

_Record = TypeVar("_Record", bound=BaseModel)


def build_page(source: Path, evaluations: Sequence[Path] = (), comparison: Path | None = None) -> Page:
    """The report of a folder written by `saap prune` or `saap compare`.

    evaluations: JSON files of `saap eval --output-file`. comparison: a folder written by `saap compare`, whose
    baselines are shown with a pruned model. Raises SaapError for anything else.
    """
    reports = [_read(EvalReport, path, "report of `saap eval`", "Give the file that it wrote") for path in evaluations]
    baselines = None if comparison is None else _read_comparison(_comparison_file(comparison))
    file = _comparison_file(source)
    if file.name == COMPARISON and file.is_file():
        if baselines is not None:
            raise EvaluationError(f"{source} is a comparison itself", "Leave out --compare, or specify a pruned model")
        return comparison_page(_read_comparison(file), reports)
    manifest = read_manifest(source)
    if manifest is None:
        raise EvaluationError(
            f"{source} was not written by `saap prune` or `saap compare`",
            "Specify a folder that one of them wrote",
        )
    return model_page(source, manifest, reports, baselines)


def _comparison_file(place: Path) -> Path:
    return place / COMPARISON if place.is_dir() else place


def _read_comparison(path: Path) -> Comparison:
    """Read a comparison. Checks that every row has the texts of the dense model, and its tasks if it has any."""
    remedy = "Specify a folder that `saap compare` wrote"
    comparison = _read(Comparison, path, "comparison", remedy)
    dense = comparison.dense
    for number, row in enumerate(comparison.rows):
        lacking = [text for text in dense.perplexity if text not in row.perplexity.keys() & row.ratios.keys()]
        lacking += [task for task in dense.tasks if row.tasks and task not in row.tasks]
        if lacking:
            raise EvaluationError(f"{path} is not a comparison (rows.{number} lacks {lacking[0]!r})", remedy)
    return comparison


def _read(kind: type[_Record], path: Path, what: str, remedy: str) -> _Record:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EvaluationError(f"{path} is not a {what} ({faults_of(error)})", remedy) from None


def write_page(page: Page, out: Path, figure_folder: Path | None) -> list[Path]:
    """Write the page, and its figures and tables as files if a folder is given. Returns the paths."""
    place, flag = out, "-o"
    try:
        write_whole(out, render(page).encode())
        if figure_folder is None:
            return [out]
        place, flag = figure_folder, "--figures"
        written = [out, *write_figures(page.figures, figure_folder)]
        tables = [(section.name, *table) for section in page.sections for table in section.tables]
        names = numbered(f"{section}-{slug(caption).lower()[:60].rstrip('-')}" for section, caption, _ in tables)
        for name, (*_, table) in zip(names, tables, strict=True):
            written += write_table(table, figure_folder / name, ("md", "tex"))
        return written
    except OSError as error:
        raise OutputError(f"{place} cannot be written ({error.strerror})", f"Choose another {flag}") from error
