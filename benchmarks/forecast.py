"""Compares what `saap prune --dry-run` says that a run will take with what the run takes.

    python benchmarks/forecast.py [flags of `saap prune`]      # default: --pruning-ratio 0.2 --effort fast

Writes benchmarks/results/forecast.json, seconds and peak resident bytes of each stage, forecast and measured, and the
table of benchmarks/README.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from readme_tables import write_between_marks

RESULTS = Path(__file__).resolve().parent / "results"
FLAGS = ["--pruning-ratio", "0.2", "--effort", "fast"]
UNITS = {
    "seconds": ("time, s", 1, 0),
    "peak_resident_bytes": ("peak memory, GB", 1e9, 2),
    "disk_bytes": ("disk, MB", 1e6, 0),
}


def saap(flags: list[str], out: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "saap", "prune", "smollm2", *flags, "--out", str(out), "--json", *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def table(result: dict[str, Any]) -> str:
    lines = [f"`{result['command']}`:", "", "| what | forecast | measured | error |", "|---|---|---|---|"]
    for name, (label, unit, digits) in UNITS.items():
        said, took = result["forecast_and_measured"][name]
        lines.append(
            f"| {label} | {said / unit:.{digits}f} | {took / unit:.{digits}f} | {result['error'][name]:+.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    flags = sys.argv[1:] or FLAGS
    with tempfile.TemporaryDirectory() as folder:
        load = os.getloadavg()[0]
        forecast = saap(flags, Path(folder) / "out", "--dry-run")["forecast"]
        report = saap(flags, Path(folder) / "out")
        size = sum(file.stat().st_size for file in (Path(folder) / "out").rglob("*") if file.is_file())
    measured = report["stages"]
    rows = [
        {
            "stage": said["name"],
            "seconds": [said["seconds"], took["seconds"]],
            "peak_resident_bytes": [said["peak_resident_bytes"], took["peak_resident_bytes"]],
        }
        for said, took in zip(forecast["stages"], measured, strict=True)
    ]
    pairs = {
        "seconds": (forecast["seconds"], sum(stage["seconds"] for stage in measured)),
        "peak_resident_bytes": (
            forecast["peak_resident_bytes"], max(stage["peak_resident_bytes"] for stage in measured),
        ),
        "disk_bytes": (forecast["disk_bytes"], size),
    }  # fmt: skip
    result = {
        "command": "saap prune smollm2 " + " ".join(flags),
        "forecast_and_measured": pairs,
        "error": {name: said / took - 1 for name, (said, took) in pairs.items()},
        "stages": rows,
        "environment": {"cores": os.cpu_count(), "load_before": [load, os.getloadavg()[0]]},
    }
    (RESULTS / "forecast.json").write_text(json.dumps(result, indent=1) + "\n")
    write_between_marks("forecast", table(result))
    print(json.dumps({"error": result["error"], **pairs}))


if __name__ == "__main__":
    main()
