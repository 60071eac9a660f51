"""What `saap prune --dry-run` says that a run will take, compared with what the run takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import peak_of, saap

FLAGS = ["--pruning-ratio", "0.2", "--effort", "fast"]
UNITS = {
    "seconds": ("time, s", 1, 0),
    "peak_resident_bytes": ("peak memory, GB", 1e9, 2),
    "disk_bytes": ("disk, MB", 1e6, 0),
}


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    """Seconds and peak resident bytes of each stage and of the whole run, forecast and measured."""
    flags = request.given["flags"].split() if "flags" in request.given else FLAGS
    with tempfile.TemporaryDirectory() as folder:
        load, out = os.getloadavg()[0], Path(folder) / "out"
        command = ["prune", request.model, *flags, "--out", out]
        forecast = saap(*command, "--dry-run")["forecast"]
        report = saap(*command)
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    both = list(zip(forecast["stages"], report["stages"], strict=True))
    stages = [
        {
            "stage": said["name"],
            **{name: [said[name], took[name]] for name in ("seconds", "peak_resident_bytes")},
        }
        for said, took in both
    ]
    pairs = {
        "seconds": (forecast["seconds"], sum(stage["seconds"] for stage in report["stages"])),
        "peak_resident_bytes": (forecast["peak_resident_bytes"], peak_of(report)),
        "disk_bytes": (forecast["disk_bytes"], size),
    }
    yield (
        "forecast",
        {
            "command": " ".join(["saap prune", request.model, *flags]),
            "forecast_and_measured": pairs,
            "error": {name: said / took - 1 for name, (said, took) in pairs.items()},
            "stages": stages,
            "environment": {"cores": os.cpu_count(), "load_before": [load, os.getloadavg()[0]]},
        },
    )


def summarise(cells: Cells) -> dict[str, Any]:
    found: Values = cells["forecast"]
    rows = [
        {"label": label, "values": [value / unit for value in found["forecast_and_measured"][name]], "digits": digits,
         "error": found["error"][name]}
        for name, (label, unit, digits) in UNITS.items()
    ]  # fmt: skip
    return {"command": found["command"], "rows": rows, "error": found["error"]}


EXPERIMENT = Experiment(
    name="forecast", cells=lambda request: ["forecast"], measure=measure, summarise=summarise,
    options={"flags": "FLAGS"}, own_files=True, smoke=False,
)  # fmt: skip
