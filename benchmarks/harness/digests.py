"""Digests of the code that decides measured values, and the cells that other code measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRUNING = (
    "core", "data", "discovery", "estimation", "evaluation", "models", "pipeline/prune", "pipeline/shared",
    "settings/presets.py", "settings/prune.py", "structure_search", "surgery",
)  # fmt: skip
"""What decides the figures of a pruned model, if the experiment does not say otherwise."""
MAKING = (*PRUNING, "recovery", "pipeline/recover")
"""What decides a pruned or tuned folder."""
EQUAL = ROOT / "benchmarks" / "equal_code.json"
"""By part, digests before and after changes that compute the same."""


def place_of(part: str) -> Path:
    """A package or a file: of saap, or of the experiments if it begins with `benchmarks`."""
    return ROOT / part if part.startswith("benchmarks/") else ROOT / "src" / "saap" / part


def digests(parts: Sequence[str]) -> dict[str, str]:
    """Digest of each part as it is on disk now."""
    return {part: _digest(place_of(part)) for part in parts}


def code_name(parts: Sequence[str]) -> str:
    """Short name of the parts as they are now, for a folder in which runs resume: rows of other code are not in it."""
    return hashlib.sha256("".join(digests(parts).values()).encode()).hexdigest()[:8]


def _digest(part: Path) -> str:
    if not part.exists():
        raise SystemExit(f"{part} does not exist: correct the parts of the experiments")
    found = hashlib.sha256()
    for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
        if file.is_file() and "__pycache__" not in file.parts:
            found.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return found.hexdigest()[:12]


def record_equal(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Note that code with these digests computes the same: `scripts/run_digests.py` has compared it."""
    known = _read_equal()
    for part in before.keys() & after.keys():
        pair = [before[part], after[part]]
        if before[part] != after[part] and pair not in known.get(part, ()):
            known.setdefault(part, []).append(pair)
    EQUAL.write_text(json.dumps({part: known[part] for part in sorted(known)}, indent=1) + "\n")


def _read_equal() -> dict[str, list[list[str]]]:
    return dict(json.loads(EQUAL.read_text())) if EQUAL.is_file() else {}


def _equals(digest: str, pairs: Sequence[Sequence[str]] | None) -> set[str]:
    """The digest, and those of code that computes the same, over any number of changes."""
    found, left = {digest}, [set(pair) for pair in pairs or ()]
    while near := [pair for pair in left if pair & found]:
        found = found.union(*near)
        left = [pair for pair in left if pair not in near]
    return found


def stale(cells: Mapping[str, Mapping[str, Any]], parts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names of cells that the present code did not measure, each with how they were. parts: of the experiment.

    cells: records. Folders that were made for cells are the same.
    """
    now, equal = digests(parts), _read_equal()
    for name, record in cells.items():
        before = record.get("code")
        if before is None:
            yield name, "before digests were kept"
        elif changed := [
            part for part in now if now[part] not in _equals(before.get(part, now[part]), equal.get(part))
        ]:
            yield name, f"with other code in {', '.join(changed)}"
        elif unknown := [part for part in now if part not in before]:
            yield name, f"before digests were kept of {', '.join(unknown)}"


def code_file(folder: Path) -> Path:
    """File beside a folder that was made for cells, with digests of the code that made it."""
    return folder.with_name(f"{folder.name}.code.json")


def stale_folders(work: Path) -> Iterator[tuple[str, str]]:
    """Folders that the present code did not make, each with how they were made."""
    folders = [manifest.parents[1] for manifest in sorted(work.rglob("saap/manifest.json"))]
    files = {folder: code_file(folder) for folder in folders}
    codes = {str(one): {"code": json.loads(file.read_text())} if file.is_file() else {} for one, file in files.items()}
    yield from stale(codes, MAKING)
