"""Cells on disk: each in a file of its own, written whole, with the settings and the environment it was measured in."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saap.core.files import whole_file

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "benchmarks" / "results"
PACKAGES = ("saap", "torch", "transformers", "numpy", "scipy")


def environment() -> dict[str, Any]:
    """Versions, processor and load of this machine."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a reader sees the old file or the new one."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def cell_file(out: Path, row: str, cell: str) -> Path:
    """Where the cell of a row lies."""
    return out / "cells" / row / f"{cell}.json"


def finished_cell(out: Path, row: str, cell: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a cell that was measured with these settings, or None."""
    path = cell_file(out, row, cell)
    if not path.is_file():
        return None
    record: dict[str, Any] = read_json(path)
    return record if record["settings"] == json.loads(json.dumps(settings)) else None


def write_cell(
    out: Path, row: str, cell: str, settings: Mapping[str, Any], values: Mapping[str, Any], seconds: float
) -> None:
    """Keep what a cell has found."""
    record = {
        "settings": settings, "seconds": round(seconds, 1), "environment": environment(), "values": values,
    }  # fmt: skip
    write_json(cell_file(out, row, cell), record)
