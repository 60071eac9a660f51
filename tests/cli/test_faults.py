"""Runs that are killed, interrupted or cannot write: what is left can be taken up, and nothing is half-written."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline import tiny

KILLS = 24
PRUNE = ["--effort", "fast", "--samples", "4", "--sample-length", "32", "--refit-tokens", "1024", "--align", "8"]


@dataclass
class Runner:
    """A model, a text, and runs on them in processes of their own."""

    source: Path
    text: Path
    folder: Path
    numbers: list[int] = field(default_factory=list)

    def prune(self, out: Path, *more: str) -> list[str]:
        start = ["prune", str(self.source), "--pruning-ratio", "0.1,0.3", "--out", str(out)]
        return [*start, "--calibration", str(self.text), *PRUNE, *more]

    def run(self, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
        self.numbers.append(len(self.numbers))
        base = self.folder / f"jobs-{len(self.numbers)}"
        for number, job in enumerate(jobs):
            job.setdefault("stdout", f"{base}-{number}.out")
            job.setdefault("stderr", f"{base}-{number}.err")
        warm_up = self.prune(self.folder / "never", "--dry-run")
        Path(f"{base}.json").write_text(json.dumps({"warm_up": warm_up, "jobs": jobs}))
        command = [sys.executable, str(Path(__file__).with_name("forked.py")), f"{base}.json", f"{base}.done"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        results = json.loads(Path(f"{base}.done").read_text())
        return [
            {**result, "stderr": Path(job["stderr"]).read_text()} for result, job in zip(results, jobs, strict=True)
        ]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("faults")
    return Runner(tiny.folder(folder / "dense", num_hidden_layers=2), tiny.text_file(folder / "text.txt"), folder)


def digest(out: Path) -> dict[str, str]:
    """Digests of weights and plans."""
    files = [*out.glob("*/model.safetensors"), *out.glob("*/saap/plan.json")]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir())


def test_killed_anywhere_and_taken_up(runner: Runner, tmp_path: Path) -> None:
    whole = tmp_path / "whole" / "out"
    (undisturbed,) = runner.run({"arguments": runner.prune(whole)})
    assert undisturbed["code"] == 0, undisturbed["stderr"]
    events = undisturbed["events"]
    assert events > KILLS
    points = [round(1 + index * (events - 1) / (KILLS - 1)) for index in range(KILLS)]
    assert len(set(points)) == KILLS
    outs = [tmp_path / str(point) / "out" for point in points]
    jobs: list[dict[str, Any]] = []
    for point, out in zip(points, outs, strict=True):
        jobs.append({"arguments": runner.prune(out), "signal": int(signal.SIGKILL), "at": point})
        jobs.append({"arguments": runner.prune(out)})
    results = runner.run(*jobs)
    expected = digest(whole)
    assert len(expected) == 4
    for point, out, killed, resumed in zip(points, outs, results[::2], results[1::2], strict=True):
        assert killed["code"] == -signal.SIGKILL, point
        if resumed["code"] == 2:  # the result was whole and in its place, and only the work folder had to go
            assert "exists" in resumed["stderr"], (point, resumed["stderr"])
            assert point > points[-3]
        else:
            assert resumed["code"] == 0, (point, resumed["stderr"])
            assert beside(out) == ["out"], point
            assert sorted(path.name for path in out.iterdir()) == ["0.1", "0.3"], point
        assert digest(out) == expected, point


def test_an_interrupted_run_says_so_and_leaves_no_output(runner: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped, resumed = runner.run(
        {"arguments": runner.prune(out), "signal": int(signal.SIGINT), "at": 12}, {"arguments": runner.prune(out)}
    )
    assert stopped["code"] == 130
    assert stopped["stderr"].startswith("interrupted: ")
    assert "Traceback" not in stopped["stderr"]
    assert resumed["code"] == 0
    assert beside(out) == ["out"]


@pytest.mark.parametrize("largest", [5_000, 30_000])
def test_a_full_disk(runner: Runner, tmp_path: Path, largest: int) -> None:
    """The scores, or only the weights, do not fit."""
    out = tmp_path / "out"
    full, again = runner.run(
        {"arguments": runner.prune(out), "largest_file": largest}, {"arguments": runner.prune(out)}
    )
    assert full["code"] == 2, full["stderr"]
    assert full["stderr"].startswith("error: ")
    assert full["stderr"].count("\n") == 1
    assert "cannot be written" in full["stderr"]
    assert again["code"] == 0, again["stderr"]
    assert beside(out) == ["out"]


def test_an_output_that_cannot_be_written(runner: Runner) -> None:
    (refused,) = runner.run({"arguments": runner.prune(Path("/proc/saap/out"))})
    assert refused["code"] == 2
    assert refused["stderr"].startswith("error: ")
    assert refused["stderr"].count("\n") == 1
