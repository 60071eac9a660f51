"""In a terminal, results are drawn below the progress: its last state would take the place of their last lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests import command

from saap.cli.show import output, prune
from saap.pipeline.prune import run, with_recovery
from saap.pipeline.shared.progress import Silent

ENDINGS = {
    "print_preview": ["--dry-run"], "print_results": [], "print_all_stages": ["--recover", "mixed"],
}  # fmt: skip


@pytest.mark.parametrize("drawing", ENDINGS)
def test_results_are_drawn_after_the_progress(
    drawing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    @contextmanager
    def progress(_: object) -> Iterator[Silent]:
        yield Silent()
        order.append("progress ended")

    monkeypatch.setattr(output, "make_reporter", progress)
    monkeypatch.setattr(run, "preview", lambda *_: {})
    monkeypatch.setattr(run, "run_prune", lambda *_: [])
    monkeypatch.setattr(with_recovery, "prune_and_recover", lambda *_: [])
    monkeypatch.setattr(prune, drawing, lambda *_: order.append("drawn"))
    code, _, errors = command.run(
        capsys, "prune", "MODEL", "--pruning-ratio", "0.2", "-o", tmp_path / "out", *ENDINGS[drawing]
    )
    assert code == 0, errors
    assert order == ["progress ended", "drawn"]
