"""Terminal output: progress, tables, answers. Only drawing, no computation."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from saap.core.errors import printable
from saap.pipeline.shared.progress import Reporter, Silent
from saap.settings.run import Display

if TYPE_CHECKING:
    from saap.core.manifest import VocabularyRecord
    from saap.pipeline.prune.result import PruneReport
    from saap.pipeline.recover.result import RecoverReport

BAR_WIDTH = 24
PLAIN_SECONDS = 15.0
PLAIN_WIDTH = 140


class PlainReporter:
    """Plain lines for logs and pipes: one per stage, and one every 15 seconds inside a long stage."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._title = ""
        self._start = self._last = time.monotonic()

    def stage(self, title: str) -> None:
        """Print the stage's title."""
        self._title, self._start = title, time.monotonic()
        self._last = self._start
        print(f"{title} ...", file=self._stream, flush=True)

    def advance(self, done: int, total: int) -> None:
        """Print the progress and the remaining time of the stage from time to time."""
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS or done == 0:
            return
        self._last = now
        left = (now - self._start) / done * (total - done)
        print(f"  {self._title}: {done}/{total}, about {left:.0f} s left", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Print a fact."""
        print(f"  {text}", file=self._stream, flush=True)


class RichReporter:
    """One line per stage with a bar and the time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def close(self) -> None:
        """Finish the last stage's line."""
        if self._task is not None:
            total = self._progress.tasks[self._task].total or 1
            self._progress.update(self._task, total=total, completed=total)

    def stage(self, title: str) -> None:
        """Finish the last stage's line and begin another."""
        self.close()
        self._task = self._progress.add_task(title, total=None)

    def advance(self, done: int, total: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        """Print a fact above the bars."""
        self._progress.console.print(f"  {escape(text)}", highlight=False)


@contextmanager
def make_reporter(display: Display) -> Iterator[Reporter]:
    """Progress on a terminal, plain lines elsewhere, nothing if quiet; on stderr when stdout carries JSON."""
    stream = sys.stderr if display.as_json else sys.stdout
    if display.quiet:
        yield Silent()
    elif stream.isatty():
        columns = (
            TextColumn("{task.description}"), BarColumn(BAR_WIDTH), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
        )  # fmt: skip
        with Progress(*columns, console=Console(file=stream)) as progress:
            reporter = RichReporter(progress)
            yield reporter
            reporter.close()
    else:
        yield PlainReporter(stream)


def show(display: Display, data: dict[str, Any] | str, draw: Callable[[], None]) -> None:
    """Print a result as JSON, draw it, or print nothing if quiet. data: JSON-able, or JSON text."""
    if display.as_json:
        print(data if isinstance(data, str) else json.dumps(data, indent=1))
    elif not display.quiet:
        draw()


def console_for_tables() -> Console:
    """Console on stdout; wide where no terminal sets a width, so that files and pipes get unfolded lines."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def print_structures(shown: Mapping[str, Any]) -> None:
    """Table of the coupled structures of a model."""
    console = console_for_tables()
    console.print(
        f"{escape(str(shown['model']))}: {shown['parameters']:,} parameters, {shown['block_parameters']:,} of them in "
        f"{shown['blocks']} decoder blocks"
    )
    table = Table("role", "groups", "units", "parameters / unit")
    table.add_column("member", overflow="fold")
    for heading in ("axis", "width", "side"):
        table.add_column(heading)
    for row in shown["roles"]:
        sizes = [row["role"], str(row["groups"]), str(row["units"]), f"{row['parameters_per_unit']:,}"]
        for member in row["members"]:
            table.add_row(
                *sizes, escape(member["tensor"]), str(member["axis"]), str(member["width"]), member["side"],
                end_section=member is row["members"][-1],
            )  # fmt: skip
            sizes = [""] * len(sizes)
    console.print(table)
    for refusal in shown["refused"]:
        console.print(f"not pruned: {escape(refusal['name'])}: {escape(refusal['reason'])}")


def print_preview(shown: Mapping[str, Any]) -> None:
    """Draw the result of a dry run."""
    console = console_for_tables()
    console.print(f"model: {escape(str(shown['model']))}, {shown['parameters']:,} parameters")
    if shown["vocabulary"] is not None:
        tokens = shown["vocabulary"]["tokens"]
        console.print(f"vocabulary: {tokens['after']:,} of {tokens['before']:,} tokens would stay")
    reachable = f"reachable with {', '.join(shown['roles'])}"
    speedup = shown["settings"]["target_speedup"]
    for target in shown["targets"]:
        what = f"at least {target['removal']:,} parameters are removed"
        if speedup is not None:
            what = f"decoding {speedup:g} times as fast in {shown['settings']['runtime']}"
        console.print(f"target {escape(target['name'])}: {what}; {reachable}")
    for name, tokens in shown["tokens"].items():
        console.print(f"tokens for {name}: {tokens:,}")
    table = Table("stage on this machine", "about s", "memory, GB", "disk, MB")
    forecast = shown["forecast"]
    for stage in forecast["stages"]:
        seconds = "?" if stage["seconds"] is None else f"{stage['seconds']:.0f}"
        disk = f"{stage['disk_bytes'] / 1e6:,.0f}" if stage["disk_bytes"] else ""
        table.add_row(escape(stage["name"]), seconds, f"{stage['peak_resident_bytes'] / 1e9:.1f}", disk)
    peak = f"{forecast['peak_resident_bytes'] / 1e9:.1f}"
    table.add_row("all", f"{forecast['seconds']:.0f}", peak, f"{forecast['disk_bytes'] / 1e6:,.0f}")
    console.print(table)
    if shown["recover"]:
        console.print(f"then it would be tuned on {escape(', '.join(shown['recover']))}; not part of the forecast.")
    console.print("nothing was written.")


def print_results(reports: Sequence[PruneReport], opened: Sequence[Mapping[str, Any]] = ()) -> None:
    """Draw the summary of each result. opened: what each did in other programs, under `opened`."""
    console = console_for_tables()
    for report, found in zip(reports, opened or [{}] * len(reports), strict=True):
        console.print(f"\n[bold]{escape(report.path or 'pruned model')}[/bold]")
        table = Table("", "dense", "pruned", "ratio")
        for label, dense, pruned in (
            ("parameters", report.parameters_dense, report.parameters),
            ("in decoder blocks", report.block_parameters_dense, report.block_parameters),
            (f"bytes ({report.dtype})", report.bytes_dense, report.bytes),
        ):
            table.add_row(label, f"{dense:,}", f"{pruned:,}", f"{pruned / dense:.3f}")
        values = (f"{report.perplexity_dense:.2f}", f"{report.perplexity:.2f}", f"{report.perplexity_ratio:.3f}")
        table.add_row(f"perplexity ({escape(report.evaluation_text)})", *values)
        console.print(table)
        if report.kinds:
            console.print(_kinds_table(report))
        if report.vocabulary is not None:
            console.print(_vocabulary_table(report.vocabulary))
        if report.speed is not None:
            speed = report.speed
            console.print(
                f"speed of decoding: {speed['reached']:.2f} of the dense model's, requested {speed['asked']:g}, "
                f"predicted {speed['predicted']:.2f}; {speed['dense_tokens_per_second']:.1f} -> "
                f"{speed['tokens_per_second']:.1f} tokens/s in {speed['runtime']} ({speed['weights']}, "
                f"{speed['threads']} threads)"
            )
        if report.block_parameters < report.block_parameters_dense:
            console.print("kept units per layer:")
        for row in report.structure if report.block_parameters < report.block_parameters_dense else ():
            cells = []
            for role, kept, units in row.parts:
                filled = round(BAR_WIDTH * kept / units) if units else 0
                cells.append(f"{role} {'█' * filled}{'░' * (BAR_WIDTH - filled)} {kept:>5}/{units}")
            console.print(f"  {row.name:>6}  " + "   ".join(cells))
        _print_answers(console, report.prompt, {"dense": report.answer_dense, "pruned": report.answer})
        for finding in report.findings:
            console.print(f"[yellow]look here:[/yellow] {escape(finding)}")
        _print_end(console, report)
        _print_opened(console, found)


def _print_opened(console: Console, found: Mapping[str, Any]) -> None:
    """Draw the programs that opened the result, and those that could not."""
    for one in found.get("opened", ()):
        if one["error"] is None:
            console.print(f"opened in {one['consumer']} {one['version']}: {one_line(one['written'])}")
        else:
            console.print(f"[yellow]look here:[/yellow] {one['consumer']} did not open it ({one_line(one['error'])})")


def _print_answers(console: Console, prompt: str, answers: Mapping[str, str | None]) -> None:
    if prompt:
        console.print(f"prompt: {one_line(prompt)}")
        width = max(map(len, answers)) + 1
        for label, answer in answers.items():
            if answer is not None:
                console.print(f"  {label + ':':<{width}} {one_line(answer)}")


def _print_end(console: Console, report: PruneReport | RecoverReport) -> None:
    """Draw the time and memory of the run, and the lines that open its result."""
    peak = max((stage.peak_resident_bytes for stage in report.stages), default=0)
    console.print(f"took {sum(stage.seconds for stage in report.stages):.0f} s, at most {peak / 1e9:.1f} GB of memory")
    if report.load_lines:
        console.print("open it with:", *(f"  {escape(line)}" for line in report.load_lines), sep="\n")


def _kinds_table(report: PruneReport) -> Table:
    """Draw the perplexity before and after by kind of text."""
    vocabulary = report.vocabulary
    title = "perplexity by kind of text" + (", per token of the dense model" if vocabulary is not None else "")
    more = ("bits/byte, dense", "pruned", "bytes/token, dense", "pruned") if vocabulary is not None else ()
    table = Table("kind of text", "dense", "pruned", "ratio", *more, title=title, title_justify="left")
    for kind in report.kinds:
        cells = [f"{kind.before:.2f}", f"{kind.after:.2f}", f"{kind.ratio:.2f}"]
        if vocabulary is not None:
            bits = (kind.bits_per_byte, kind.bits_per_byte_after)
            cells += ["" if value is None else f"{value:.3f}" for value in bits]
            cells += [f"{value:.2f}" for value in vocabulary.texts[kind.text].bytes_per_token]
        table.add_row(kind.text, *cells)
    return table


def _vocabulary_table(vocabulary: VocabularyRecord) -> Table:
    """Draw the tokens before and after by script."""
    title = f"tokens by script; those of {', '.join(vocabulary.languages)} stay"
    table = Table("script", "dense", "pruned", title=title, title_justify="left")
    for script, change in vocabulary.largest_scripts().items():
        table.add_row(escape(script), f"{change.before:,}", f"{change.after:,}")
    table.add_section()
    table.add_row("all", f"{vocabulary.tokens.before:,}", f"{vocabulary.tokens.after:,}")
    return table


def one_line(text: str) -> str:
    """Text of a model or folder on one line, without control characters and markup."""
    return escape(" ".join(printable(text).split()))


def print_all_stages(
    results: Sequence[tuple[PruneReport, RecoverReport]], opened: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Draw the summary of each result that was pruned and then tuned. opened: as in `print_results`."""
    for (pruned, tuned), found in zip(results, opened or [{}] * len(results), strict=True):
        print_results([pruned.model_copy(update={"path": None, "load_lines": ()})])
        print_recovery(tuned)
        _print_opened(console_for_tables(), found)


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
    packed = f"; packed {report.packed_bytes:,}" if report.packed_bytes is not None else ""
    console.print(f"bytes of the weights: {report.bytes:,} ({report.dtype}){packed}")
    answers = {"dense": report.answer_dense or None, "before": report.answer_before or None}
    _print_answers(console, report.prompt, {**answers, "recovered": report.answer or None})
    _print_end(console, report)


def print_recipe_preview(shown: Mapping[str, Any]) -> None:
    """The steps of a dry run."""
    console = console_for_tables()
    console.print(f"model: {escape(shown['model'])} ({shown['class']}), {shown['parameters']:,} parameters")
    for step in shown["steps"]:
        size = ""
        if "parameters" in step:
            share = step["parameters"] / shown["parameters"]
            size = (
                f" ({step['parameters']:,} parameters, {share:.1%}; {step['bytes'] / 1e6:,.0f} MB of {step['dtype']})"
            )
        elif "speedup" in step:
            size = f" (decoding {step['speedup']:g} times as fast in {step['runtime']}; its size is found by measuring)"
        target = f" {escape(step['target'])}" if "target" in step else ""
        console.print(f"{escape(step['name'])}{target} -> {escape(step['output'])}{size}")
    console.print("nothing was written.")


def print_recipe(done: Mapping[str, Any]) -> None:
    """Draw the steps of a run and the paths of their outputs."""
    console = console_for_tables()
    for step in done["steps"]:
        console.print(f"{escape(step['name'])} ({step['fate']}): {escape(', '.join(step['outputs']))}")


def print_comparison(headings: Sequence[str], rows: Sequence[Sequence[str]], written: Iterable[Path]) -> None:
    """Draw the table of all rows at full width, and list the written files."""
    table = Table(*map(escape, headings), box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(highlight=False, soft_wrap=True, width=max(80, sum(map(len, headings)) + 40 * 3))
    console.print(table)
    print(f"wrote {', '.join(map(str, written))}")
