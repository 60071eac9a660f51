"""Digests of the code that decides measured values, and the cells that other code measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parents[2] / "src" / "saap"
PRUNING = (
    "data", "discovery", "estimation", "evaluation", "models", "pipeline/prune", "settings/prune.py",
    "structure_search", "surgery",
)  # fmt: skip
"""What decides the figures of a pruned model, if the experiment does not say otherwise."""


def digests(parts: Sequence[str]) -> dict[str, str]:
    """Digest of each part, a package or a file of saap."""
    return {part: _digest(SOURCES / part) for part in parts}


@cache
def _digest(part: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
        if file.is_file() and "__pycache__" not in file.parts:
            found.update(file.relative_to(SOURCES).as_posix().encode() + file.read_bytes())
    return found.hexdigest()[:12]


def stale(cells: Mapping[str, Mapping[str, Any]], parts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Cells that the present code did not measure, each with the reason. cells: records. parts: of the experiment."""
    now = digests(parts)
    for name, record in cells.items():
        before = record.get("code")
        if before is None:
            yield name, "measured before digests were kept"
        elif changed := [part for part in now if before.get(part) != now[part]]:
            yield name, f"measured with other code in {', '.join(changed)}"
