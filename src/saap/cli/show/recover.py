"""Terminal output of `saap recover`. Only drawing, no computation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from saap.cli.show.output import console_for_tables, print_answers, print_end

if TYPE_CHECKING:
    from saap.pipeline.recover.forecast import RecoveryForecast
    from saap.pipeline.recover.result import RecoverReport


def print_recovery(report: RecoverReport) -> None:
    """The summary of a recovery."""
    console = console_for_tables()
    console.print(f"\n[bold]{escape(report.path or 'tuned model')}[/bold]")
    table = Table("", f"perplexity ({escape(report.evaluation_text)})", "ratio to dense")
    dense = report.perplexity_dense
    for label, value in (
        ("dense", dense),
        ("before", report.perplexity_before),
        ("quantised", report.perplexity_quantised),
        ("recovered", report.perplexity),
    ):
        if value is not None:
            table.add_row(label, f"{value:.2f}", f"{value / dense:.3f}" if dense else "")
    console.print(table)
    if report.gap_closed is not None:
        share = round(report.gap_closed, 2) + 0.0  # no minus sign before a zero
        console.print(f"{share:.0%} of the gap in log-perplexity to the dense model is closed")
    console.print(
        f"validation {report.validation_before:.4f} -> {report.validation:.4f} (step {report.best_step} of "
        f"{report.steps}); {report.tokens:,} tokens in {report.seconds:.0f} s; stopped by {report.stopped_by}"
    )
    if not report.best_step:
        console.print(
            "no step lowered the validation loss, so the result has the weights that the training began with; "
            "lower --learning-rate, or give more --data"
        )
    packed = f"; packed {report.packed_bytes:,}" if report.packed_bytes is not None else ""
    console.print(f"bytes of the weights: {report.bytes:,} ({report.dtype}){packed}")
    answers = {"dense": report.answer_dense or None, "before": report.answer_before or None}
    print_answers(console, report.prompt, {**answers, "recovered": report.answer or None})
    print_end(console, report)


def print_forecast(found: RecoveryForecast) -> None:
    """The forecast of a recovery."""
    console = console_for_tables()
    console.print(f"model: {escape(found.model)}, {found.parameters:,} parameters would be trained")
    console.print(f"a step takes {found.seconds_of_step:.2f} s; {found.steps:,} steps until the first limit")
    console.print(f"about {found.tokens:,} tokens in {found.seconds / 60:.1f} minutes of training")
    teacher = "" if found.validation_teacher is None else f" (the teacher {found.validation_teacher:.4f})"
    if found.validation is None or found.gap_closed is None:
        console.print(f"validation {found.validation_before:.4f}{teacher}; its end is not forecast for these settings")
    else:
        console.print(
            f"validation {found.validation_before:.4f} -> about {found.validation:.4f}{teacher}: "
            f"about {found.gap_closed:.0%} of the gap is closed"
        )
    console.print("nothing was written.")
