"""`saap prune` killed at points spread evenly over its work, resumed with the same command, and the results compared.

A run is killed (SIGKILL) when it has used its share of the processor seconds of the undisturbed run, which other work
on the machine hardly changes; Linux only.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.experiment import Cells, Experiment, Measured, Request

FLAGS = ["--pruning-ratio", "0.2", "--effort", "fast"]
POINTS = 20
COMPARED = ("model.safetensors", "plan.json")


def start(flags: Sequence[str], out: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "saap", "prune", *flags, "--out", str(out)]
    return subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT)


def processor_seconds(process: subprocess.Popen[bytes]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def watched(process: subprocess.Popen[bytes], limit: float | None = None) -> float:
    """Processor seconds of a run, which is killed once it has used `limit` of them."""
    used = 0.0
    while process.poll() is None:
        used = max(used, processor_seconds(process))
        if limit is not None and used >= limit:
            process.kill()
            process.wait()
            break
        time.sleep(0.02)
    return used


def stage_of(log: Path) -> str:
    titles = [line.removesuffix(" ...") for line in log.read_text().splitlines() if line.endswith(" ...")]
    return titles[-1] if titles else "before the first stage"


def digests(out: Path) -> dict[str, str]:
    files = [file for name in COMPARED for file in out.rglob(name)]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def undisturbed(flags: Sequence[str], folder: Path) -> tuple[float, dict[str, str]]:
    process = start(flags, folder / "out", folder.with_suffix(".log"))
    seconds = watched(process)
    if process.returncode:
        raise SystemExit(folder.with_suffix(".log").read_text())
    return seconds, digests(folder / "out")


def killed(flags: Sequence[str], folder: Path, limit: float, expected: dict[str, str]) -> dict[str, Any]:
    first = start(flags, folder / "out", folder.with_suffix(".log"))
    used = watched(first, limit)
    again = start(flags, folder / "out", folder.with_suffix(".again"))
    more = watched(again)
    return {
        "killed_after_seconds": round(used, 2),
        "killed": first.returncode < 0,
        "stage": stage_of(folder.with_suffix(".log")),
        "exit_code": again.returncode,
        "seconds_after": round(more, 2),
        "equal": digests(folder / "out") == expected,
        "left": sorted(path.name for path in folder.iterdir() if path.name != "out"),
    }


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    """The stage that was killed, whether the digests are those of the undisturbed run, and what else is left."""
    flags = [request.model, *(request.given["flags"].split() if "flags" in request.given else FLAGS)]
    points = int(request.given.get("points", POINTS))
    with tempfile.TemporaryDirectory() as base:
        (Path(base) / "whole").mkdir()
        whole, expected = undisturbed(flags, Path(base) / "whole")
        result: dict[str, Any] = {"command": " ".join(["saap prune", *flags]), "processor_seconds": whole, "points": []}
        for point in range(points):
            folder = Path(base) / str(point)
            folder.mkdir()
            result["points"].append(killed(flags, folder, whole * (point + 0.5) / points, expected))
            yield "faults", result


def summarise(cells: Cells) -> dict[str, Any]:
    found = cells["faults"]
    whole = found["processor_seconds"]
    rows = [
        {**point, "at": point["killed_after_seconds"] / whole, "after": point["seconds_after"] / whole}
        for point in found["points"]
    ]
    equal = sum(row["equal"] and not row["left"] for row in rows)
    return {"command": found["command"], "rows": rows, "points": len(rows), "equal": equal}


EXPERIMENT = Experiment(
    name="faults", cells=lambda request: ["faults"], measure=measure, summarise=summarise,
    options={"flags": "FLAGS", "points": "N"}, own_files=True, smoke=False,
)  # fmt: skip
