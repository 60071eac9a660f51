"""Forecasts of `saap prune --dry-run` compared with measured runs."""

import os
import tempfile
from pathlib import Path

from harness.experiment import Cells, Measured, Names, Request, Values
from lab.commands import peak_of, saap

FLAGS = ["--pruning-ratio", "0.2", "--effort", "fast"]
UNITS = {
    "seconds": ("time, s", 1, 0),
    "peak_resident_bytes": ("peak memory, GB", 1e9, 2),
    "disk_bytes": ("disk, MB", 1e6, 0),
}
CELLS = ["forecast"]
OWN_FILES = True
SMOKE = False


def measure(request: Request, wanted: Names) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        load, out = os.getloadavg()[0], Path(folder) / "out"
        command = ["prune", request.model, *FLAGS, "--out", out]
        forecast, report = saap(*command, "--dry-run")["forecast"], saap(*command)
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    seconds = sum(stage["seconds"] for stage in report["stages"])
    took = {"seconds": seconds, "peak_resident_bytes": peak_of(report), "disk_bytes": size}
    yield "forecast", {
        "command": " ".join(["saap prune", request.model, *FLAGS]),
        "forecast_and_measured": {name: (forecast[name], took[name]) for name in UNITS},
        "error": {name: forecast[name] / took[name] - 1 for name in UNITS},
        "stages": [
            {"stage": one["name"], **{name: [one[name], two[name]] for name in ("seconds", "peak_resident_bytes")}}
            for one, two in zip(forecast["stages"], report["stages"], strict=True)
        ],
        "environment": {"cores": os.cpu_count(), "load_before": [load, os.getloadavg()[0]]},
    }  # fmt: skip


def summarise(cells: Cells) -> Values:
    found = cells["forecast"]
    rows = []
    for name, (label, unit, digits) in UNITS.items():
        values = [value / unit for value in found["forecast_and_measured"][name]]
        rows.append({"label": label, "values": values, "digits": digits, "error": found["error"][name]})
    return {**found, "rows": rows}
