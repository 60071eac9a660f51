"""Where a result goes: whether it can be put there, and the last step, in which a finished folder takes its place."""

from __future__ import annotations

import glob
import os
import re
import shutil
import uuid
from pathlib import Path

from saap.core.errors import OutputError
from saap.core.manifest import RunManifest
from saap.core.storage import write_whole
from saap.export.model_card import model_card

_SPARE_BYTES = 64 * 1024**2


def check_place(out: Path, needed_bytes: int) -> None:
    """Raise OutputError now if nothing could be written at `out` later. needed_bytes: of the weights."""
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} cannot be written", "Choose another --out")
    needed, free = needed_bytes + _SPARE_BYTES, shutil.disk_usage(parent).free
    if needed > free:
        raise OutputError(
            f"{out} needs {needed / 1e6:,.0f} MB, but {parent} has {free / 1e6:,.0f} MB free",
            "Free some space, or choose another --out",
        )


def complete_records(folder: Path, manifest: RunManifest, base_model_type: str) -> None:
    """Write the final manifest and model card into a checkpoint folder."""
    write_whole(folder / "saap" / "manifest.json", (manifest.model_dump_json(indent=2) + "\n").encode())
    write_whole(folder / "README.md", model_card(manifest, base_model_type).encode())


def place(folder: Path, out: Path) -> None:
    """Move a finished folder to `out`, whole or not at all; what was there is deleted only then.

    Raises OutputError if that cannot be done; `folder` is then still there.
    """
    mark = uuid.uuid4().hex[:8]
    part, old = out.with_name(f".{out.name}.part-{mark}"), out.with_name(f".{out.name}.old-{mark}")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, part)
        if out.exists():
            out.rename(old)
        part.rename(out)
    except OSError as error:
        if part.exists():
            shutil.move(part, folder)
        if old.exists() and not out.exists():
            old.rename(out)
        raise OutputError(f"{out} cannot be written ({error.strerror or error})", "Choose another --out") from error
    shutil.rmtree(old, ignore_errors=True)
    remove_leftovers(out)


def remove_leftovers(out: Path) -> None:
    """Once `out` is in its place: delete what processes that were killed while they placed it have left beside it."""
    for path in out.absolute().parent.glob(f".{glob.escape(out.name)}.*"):
        if re.fullmatch(r"(part|old)-[0-9a-f]{8}", path.name[len(out.name) + 2 :]):
            shutil.rmtree(path, ignore_errors=True)
