"""Digests of the code that decides measured values, and the cells that other code measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRUNING = (
    "core", "data", "discovery", "estimation", "evaluation", "models", "pipeline/prune", "pipeline/shared",
    "settings/prune.py", "structure_search", "surgery",
)  # fmt: skip
"""What decides the figures of a pruned model, if the experiment does not say otherwise."""


def place_of(part: str) -> Path:
    """A package or a file: of saap, or of the experiments if it begins with `benchmarks`."""
    return ROOT / part if part.startswith("benchmarks/") else ROOT / "src" / "saap" / part


def digests(parts: Sequence[str]) -> dict[str, str]:
    """Digest of each part as it is on disk now."""
    return {part: _digest(place_of(part)) for part in parts}


def _digest(part: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
        if file.is_file() and "__pycache__" not in file.parts:
            found.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return found.hexdigest()[:12]


def stale(cells: Mapping[str, Mapping[str, Any]], parts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Cells that the present code did not measure, each with the reason. cells: records. parts: of the experiment."""
    now = digests(parts)
    for name, record in cells.items():
        before = record.get("code")
        if before is None:
            yield name, "measured before digests were kept"
        elif changed := [part for part in now if before.get(part, now[part]) != now[part]]:
            yield name, f"measured with other code in {', '.join(changed)}"
        elif unknown := [part for part in now if part not in before]:
            yield name, f"measured before digests were kept of {', '.join(unknown)}"
