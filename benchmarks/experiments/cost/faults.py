"""`saap prune` killed at shares of the processor seconds of an undisturbed run, and resumed by the same command."""

import hashlib
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from subprocess import STDOUT
from typing import Any

import psutil
from harness.experiment import Cells, Measured, Names, Request, Values

FLAGS = ["--pruning-ratio", "0.2", "--effort", "fast"]
POINTS = 20
COMPARED = ("model.safetensors", "plan.json")
CELLS = ["faults"]
OWN_FILES = True
SMOKE = False


def run(flags: Names, folder: Path, log: str, limit: float = float("inf")) -> tuple[float, int]:
    """Processor seconds and exit code of a run, which is killed after `limit` processor seconds."""
    used = 0.0
    with (folder / log).open("wb") as file:
        command = [sys.executable, "-m", "saap", "prune", *flags, "--out", str(folder / "out")]
        process = psutil.Popen(command, stdout=file, stderr=STDOUT)
        while process.poll() is None:
            with suppress(psutil.Error):  # it has just ended
                used = max(used, sum(process.cpu_times()[:2]))
            if used >= limit:
                process.kill()
            time.sleep(0.02)
    return used, process.returncode


def digests(out: Path) -> dict[str, str]:
    files = [file for name in COMPARED for file in out.rglob(name)]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def killed(flags: Names, limit: float, expected: dict[str, str]) -> Values:
    """The killed stage, whether the digests equal those of the undisturbed run, and leftover files."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        used, code = run(flags, folder, "first.log", limit)
        more, again = run(flags, folder, "again.log")
        others = {path.name for path in folder.iterdir()} - {"out", "first.log", "again.log"}
        begun = [line for line in (folder / "first.log").read_text().splitlines() if line.endswith(" ...")]
        stage = begun[-1].removesuffix(" ...") if begun else "before the first stage"
        return {
            "killed_after_seconds": round(used, 2), "killed": code < 0, "stage": stage,
            "exit_code": again, "seconds_after": round(more, 2),
            "equal": digests(folder / "out") == expected, "left": sorted(others),
        }  # fmt: skip


def measure(request: Request, wanted: Names) -> Measured:
    flags = [request.model, *FLAGS]
    with tempfile.TemporaryDirectory() as base:
        whole, code = run(flags, Path(base), "whole.log")
        if code:
            raise SystemExit((Path(base) / "whole.log").read_text())
        expected = digests(Path(base) / "out")
    result: dict[str, Any] = {"command": " ".join(["saap prune", *flags]), "processor_seconds": whole, "points": []}
    for point in range(POINTS):
        result["points"].append(killed(flags, whole * (point + 0.5) / POINTS, expected))
        yield "faults", result


def summarise(cells: Cells) -> Values:
    found = cells["faults"]
    whole = found["processor_seconds"]
    shares = {"at": "killed_after_seconds", "after": "seconds_after"}
    rows = [{**point, **{name: point[of] / whole for name, of in shares.items()}} for point in found["points"]]
    equal = sum(row["equal"] and not row["left"] for row in rows)
    return {**found, "rows": rows, "points": len(rows), "equal": equal}
