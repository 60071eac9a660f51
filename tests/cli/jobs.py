"""Many runs of the command line, each in processes of its own, after the imports of one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import processes

RECOVER = [
    "--max-seq-length", "32", "--batch-size", "2",
    "--max-steps", "6", "--validate-every", "2", "--validation-samples", "1",
    "--rank", "2",
]  # fmt: skip
TUNING = {
    "group_size": 16, "length": 32, "batch": 2, "max_steps": 4, "validate_every": 2, "validation_samples": 1, "rank": 2,
}  # fmt: skip
PRUNE = ["--effort", "fast", "--num-samples", "4", "--sample-length", "32", "--refit-tokens", "1024", "--align", "8"]


@dataclass
class Runner:
    """A model, a text, and runs on them."""

    source: Path
    text: Path
    folder: Path
    numbers: list[int] = field(default_factory=list)

    def prune(self, out: Path, *more: str) -> list[str]:
        """The arguments of a short run with two ratios."""
        start = ["prune", str(self.source), "--pruning-ratio", "0.1,0.3", "--out", str(out)]
        return [*start, "--calibration", str(self.text), *PRUNE, *more]

    def recover(self, out: Path) -> list[str]:
        """The arguments of a short tuning, in which the model teaches its quantised self."""
        start = ["recover", str(self.source), "--out", str(out), "--data", str(self.text)]
        return [*start, "--dense", str(self.source), *RECOVER]

    def all_stages(self, out: Path, *more: str) -> list[str]:
        """The arguments of a short run with two ratios whose results are tuned, by TUNING."""
        return self.prune(out, "--align", "16", "--recover", str(self.text), *more)

    def run(self, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
        """What became of the jobs, which `forked.py` carries out."""
        self.numbers.append(len(self.numbers))
        base = self.folder / f"jobs-{len(self.numbers)}"
        for number, job in enumerate(jobs):
            job.setdefault("stdout", f"{base}-{number}.out")
            job.setdefault("stderr", f"{base}-{number}.err")
        warm_up = self.prune(self.folder / "never", "--dry-run")
        Path(f"{base}.json").write_text(json.dumps({"warm_up": warm_up, "tuning": TUNING, "jobs": jobs}))
        done = processes.python("from tests.cli import forked; forked.main()", f"{base}.json", f"{base}.done")
        assert done.returncode == 0, done.stderr
        results = json.loads(Path(f"{base}.done").read_text())
        return [
            {**result, "stderr": Path(job["stderr"]).read_text(), "stdout": Path(job["stdout"]).read_text()}
            for result, job in zip(results, jobs, strict=True)
        ]


def digest(out: Path) -> dict[str, str]:
    """Digests of weights, plain and packed, and plans of all results in a folder."""
    names = ("model.safetensors", "packed.safetensors", "plan.json")
    files = [file for name in names for file in out.rglob(name)]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def beside(out: Path) -> list[str]:
    """Names of everything in the folder that holds `out`."""
    return sorted(path.name for path in out.parent.iterdir())
