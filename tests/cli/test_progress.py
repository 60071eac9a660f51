"""Progress in lines: how much of a stage is done, and how long the rest takes."""

from __future__ import annotations

import io

import pytest

from saap.cli.show import output
from saap.cli.show.output import PlainReporter, threads


def test_the_time_left_of_a_resumed_stage_follows_from_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = iter([0.0, 0.0, 100.0, 120.0]), io.StringIO()
    monkeypatch.setattr(output.time, "monotonic", lambda: next(now))
    reporter = PlainReporter(lines)
    reporter.stage("train")
    reporter.advance(500, 1000)  # what an earlier run has done
    reporter.advance(600, 1000)  # a hundred in 20 seconds
    assert lines.getvalue().splitlines() == ["train ...", "  train: 60%, about 80 s left"]


def test_numbers_of_threads_are_words() -> None:
    assert [threads(count) for count in (1, 2)] == ["1 thread", "2 threads"]
