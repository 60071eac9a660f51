"""Terminal output: progress, tables, answers. Only drawing, no computation."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pydantic_core import to_json
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from saap.core.errors import printable
from saap.pipeline.shared.progress import Reporter, Silent
from saap.settings.run import Display

if TYPE_CHECKING:
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
        self._last = time.monotonic()
        self._begun: tuple[float, int] | None = None

    def stage(self, title: str) -> None:
        """Print the stage's title."""
        self._title, self._last, self._begun = title, time.monotonic(), None
        print(f"{title} ...", file=self._stream, flush=True)

    def advance(self, done: int, total: int) -> None:
        """Print the progress and the remaining time of the stage from time to time."""
        now = time.monotonic()
        self._begun = self._begun or (now, done)  # a resumed stage begins in the middle
        start, first = self._begun
        if now - self._last < PLAIN_SECONDS or done == first:
            return
        self._last = now
        left = (now - start) / (done - first) * (total - done)
        print(f"  {self._title}: {done / total:.0%}, about {left:.0f} s left", file=self._stream, flush=True)

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
            TextColumn("{task.description}", markup=False), BarColumn(BAR_WIDTH), TaskProgressColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(compact=True),
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
        print(data if isinstance(data, str) else to_json(data, indent=1, inf_nan_mode="null").decode())
    elif not display.quiet:
        draw()


def threads(count: int) -> str:
    """A number of threads in words."""
    return f"{count} thread{'' if count == 1 else 's'}"


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


def print_answers(console: Console, prompt: str, answers: Mapping[str, str | None]) -> None:
    """Draw what the models wrote after a prompt."""
    if prompt:
        console.print(f"prompt: {one_line(prompt)}")
        width = max(map(len, answers)) + 1
        for label, answer in answers.items():
            if answer is not None:
                console.print(f"  {label + ':':<{width}} {one_line(answer)}")


def print_end(console: Console, report: PruneReport | RecoverReport) -> None:
    """Draw the time and memory of the run, the lines that open its result, and what other programs said of it."""
    peak = max((stage.peak_resident_bytes for stage in report.stages), default=0)
    console.print(f"took {sum(stage.seconds for stage in report.stages):.0f} s, at most {peak / 1e9:.1f} GB of memory")
    if report.load_lines:
        console.print("open it with:", *(f"  {escape(line)}" for line in report.load_lines), sep="\n")
    for one in report.opened:
        if one.error is None:
            console.print(f"opened in {one.consumer} {one.version}: {one_line(one.written)}")
        else:
            console.print(f"[yellow]look here:[/yellow] {one.consumer} did not open it ({one_line(one.error)})")


def one_line(text: str) -> str:
    """Text of a model or folder on one line, without control characters and markup."""
    return escape(" ".join(printable(text).split()))


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
