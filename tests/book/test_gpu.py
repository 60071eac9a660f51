"""`benchmarks/gpu.py` on whatever is there: every step with tiny models, and a second start that keeps them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path) -> str:
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "--folder", folder / "models", "--out", folder / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_step_runs_with_tiny_models_and_is_kept(tmp_path: Path) -> None:
    assert [line.split()[1] for line in start(tmp_path).splitlines()] == ["tests", "7b", "1.5b", "real"]
    cells = json.loads((tmp_path / "out" / "accelerator.json").read_text())["cells"]
    found = {name: cell["values"] for name, cell in cells.items()}
    for stages in (found["7b"]["stages"], found["1.5b"]["prune"]["stages"], found["1.5b"]["recover"]["stages"]):
        assert all({"seconds", "peak_device_bytes", "peak_resident_bytes"} <= stage.keys() for stage in stages)
    assert set(found["real"]["perplexity"]) == {"dense", "pruned", "tuned"}
    assert start(tmp_path) == ""
