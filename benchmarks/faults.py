"""Kills `saap prune` at points spread evenly over its work, takes it up, and compares the results.

    python benchmarks/faults.py [--points 20] [flags of `saap prune`]
    python benchmarks/faults.py --table           # the table in README.md, from benchmarks/results

Default flags: smollm2 --pruning-ratio 0.2 --effort fast. Each run is killed (SIGKILL) when it has used its share of the
processor seconds of the undisturbed run, which other work on the machine hardly changes; Linux only. Then the same
command is given again. Writes benchmarks/results/faults.json after each point: the stage that was killed, whether the
digests of the weights and the plan are those of the undisturbed run, and whether anything is left beside the result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from readme_tables import write_between_marks

RESULT = Path(__file__).resolve().parent / "results" / "faults.json"
FLAGS = ["smollm2", "--pruning-ratio", "0.2", "--effort", "fast"]
COMPARED = ("model.safetensors", "plan.json")


def start(flags: list[str], out: Path, log: Path) -> subprocess.Popen[bytes]:
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


def undisturbed(flags: list[str], folder: Path) -> tuple[float, dict[str, str]]:
    process = start(flags, folder / "out", folder.with_suffix(".log"))
    seconds = watched(process)
    if process.returncode:
        raise SystemExit(folder.with_suffix(".log").read_text())
    return seconds, digests(folder / "out")


def killed(flags: list[str], folder: Path, limit: float, expected: dict[str, str]) -> dict[str, Any]:
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


def table(result: dict[str, Any]) -> str:
    whole = result["processor_seconds"]
    lines = ["| killed at | stage | work after it | digests |", "|---|---|---|---|"]
    for row in result["points"]:
        shares = (f"{row[name] / whole:.0%}" for name in ("killed_after_seconds", "seconds_after"))
        at, after = shares if row["killed"] else ("not killed", "")
        lines.append(f"| {at} | {row['stage']} | {after} | {'equal' if row['equal'] else 'DIFFERENT'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--table", action="store_true")
    options, flags = parser.parse_known_args()
    flags = flags or FLAGS
    if not options.table:
        with tempfile.TemporaryDirectory() as base:
            (Path(base) / "whole").mkdir()
            whole, expected = undisturbed(flags, Path(base) / "whole")
            result: dict[str, Any] = {"command": " ".join(["saap prune", *flags]), "processor_seconds": whole}
            result["points"] = []
            for point in range(options.points):
                folder = Path(base) / str(point)
                folder.mkdir()
                result["points"].append(killed(flags, folder, whole * (point + 0.5) / options.points, expected))
                RESULT.write_text(json.dumps(result, indent=1) + "\n")
                print(json.dumps(result["points"][-1]), flush=True)
    write_between_marks("faults", table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
