"""The last step: a finished folder takes its place."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from saap.errors import OutputError
from saap.export.manifest import RunManifest
from saap.export.model_card import model_card
from saap.storage import write_whole


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
