from __future__ import annotations

import pytest

from saap.pipeline.typed import typed_command


@pytest.mark.parametrize("program", ["/usr/bin/saap", "saap.exe", "src/saap/cli.py"])
def test_the_command_line_is_recorded(monkeypatch, program) -> None:
    monkeypatch.setattr("sys.argv", [program, "prune", "model", "--out", "small"])
    assert typed_command() == ("prune", "model", "--out", "small")


@pytest.mark.parametrize("program", ["/usr/bin/pytest", "cli.py", "saap/run.py", ""])
def test_other_programs_have_no_command(monkeypatch, program) -> None:
    monkeypatch.setattr("sys.argv", [program, "prune"])
    assert typed_command() == ()
