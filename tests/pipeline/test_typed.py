from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.pipeline import tiny

from saap.core.manifest import typed_command


@pytest.mark.parametrize("program", ["/usr/bin/saap", "saap.exe", "lib/saap/__main__.py"])
def test_the_command_line_is_recorded(monkeypatch, program) -> None:
    monkeypatch.setattr("sys.argv", [program, "prune", "model", "--out", "small"])
    assert typed_command() == ("prune", "model", "--out", "small")


@pytest.mark.parametrize("program", ["/usr/bin/pytest", "cli.py", "saap/run.py", ""])
def test_other_programs_have_no_command(monkeypatch, program) -> None:
    monkeypatch.setattr("sys.argv", [program, "prune"])
    assert typed_command() == ()


@pytest.mark.parametrize(
    "launcher",
    [[], ["torch.distributed.run", "--nproc_per_node", "1", "-m"],
     ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]],
    ids=["python -m saap", "torchrun", "accelerate launch"],
)  # fmt: skip
def test_reports_name_their_command_however_saap_was_started(tmp_path: Path, launcher: list[str]) -> None:
    arguments = [
        "eval", str(tiny.folder(tmp_path / "model", num_hidden_layers=1)), "--perplexity", "bundled", "--window", "32",
        "--max-tokens", "65", "--out", str(tmp_path / "report.json"),
    ]  # fmt: skip
    words = [sys.executable, "-m", *launcher, "saap", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "report.json").read_text())["command"] == arguments
