"""Cells on disk: one file for each experiment, written whole after each cell, with settings and environments."""

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.experiment import Experiment, Request, Values
from saap.core.files import whole_file

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("saap", "torch", "transformers", "numpy", "scipy")
DIGITS = 9
"""Stored significant digits of a measured number."""
_PLAIN_LIST = re.compile(r"\[\n([^\[\]{}]*)\n\s*\]")

Record = Mapping[str, Any]
"""values: of a cell. environment, seconds, code: machine, duration and digests of the code, if known."""


def environment() -> dict[str, Any]:
    """Versions, processor and load of this machine."""
    return {
        "python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"), "load": round(os.getloadavg()[0], 1),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }  # fmt: skip


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as JSON; lists of plain values take one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = _PLAIN_LIST.sub(lambda found: "[" + re.sub(r",\n\s*", ", ", found[1].strip()) + "]", text)
    with whole_file(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rounded(value: Any) -> Any:
    """The same values, rounded to the stored digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


def result_file(results: Path, experiment: Experiment, cell: str) -> Path:
    return results / f"{cell if experiment.own_files else experiment.name}.json"


def finished_cells(experiment: Experiment, request: Request) -> dict[str, Record]:
    """Records of the cells with the current settings, in the experiment's order."""
    names = [*experiment.names(request), *experiment.extra]
    if experiment.own_files:
        files = {name: result_file(request.results, experiment, name) for name in names}
        values = {name: read_json(file) for name, file in files.items() if file.is_file()}
        kept = ("environment", "code")
        return {name: {"values": one, **{key: one.get(key) for key in kept}} for name, one in values.items()}
    content = _content(experiment, request)
    found = {name: content["cells"][name] for name in names if name in content["cells"]}
    codes = content.get("codes", [])
    return {
        name: {
            **one, "environment": content["environments"][one["environment"]],
            "code": codes[one["code"]] if "code" in one else None,
        }
        for name, one in found.items()
    }  # fmt: skip


def write_cell(
    experiment: Experiment, request: Request, cell: str, values: Values, seconds: float, code: Mapping[str, str]
) -> None:
    """Write a cell. code: digests of what measured it."""
    file = result_file(request.results, experiment, cell)
    if experiment.own_files:
        write_json(file, {**values, "code": code})
        return
    content = _content(experiment, request)
    places = {
        "environment": _place(content["environments"], environment()),
        "code": _place(content.setdefault("codes", []), code),
    }
    content["cells"][cell] = {"seconds": round(seconds, 1), **places, "values": rounded(values)}
    for field, key in (("environment", "environments"), ("code", "codes")):  # those that no cell has are dropped
        every, content[key] = content[key], []
        for record in content["cells"].values():
            if field in record:
                record[field] = _place(content[key], every[record[field]])
    write_json(file, content)


def _place(known: list[Any], one: Any) -> int:
    """Index in a list of different values, to which a new one is added."""
    if one not in known:
        known.append(one)
    return known.index(one)


def _content(experiment: Experiment, request: Request) -> dict[str, Any]:
    """Content of the file of an experiment; without cells if they have other settings."""
    file = result_file(request.results, experiment, "")
    settings = json.loads(json.dumps(experiment.chosen(request)))
    content: dict[str, Any] = read_json(file) if file.is_file() else {}
    return content if content.get("settings") == settings else {"settings": settings, "environments": [], "cells": {}}
