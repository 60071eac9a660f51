"""Destination of a result: early checks, and the final move of a finished folder."""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saap.core.errors import ModelError, OutputError
from saap.core.files import part_of
from saap.models.loading.references import local_path, read_config

_SPARE_BYTES = 64 * 1024**2


def check_place(out: Path, needed_bytes: int, flag: str = "-o") -> None:
    """Raise OutputError early if nothing could be written at `out` later.

    needed_bytes: of the weights. flag: that specifies the place.
    """
    parent = next(path for path in out.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} cannot be written", f"Choose another {flag}")
    needed, free = needed_bytes + _SPARE_BYTES, shutil.disk_usage(parent).free
    if needed > free:
        raise OutputError(
            f"{out} needs {needed / 1e6:,.0f} MB, but {parent} has {free / 1e6:,.0f} MB free",
            f"Free some space, or choose another {flag}",
        )


def check_source_stays(source: str | Path, out: Path) -> None:
    """Raise OutputError for an output that would replace the model that is read."""
    read = local_path(source)
    if read.exists() and read.resolve().is_relative_to(out.resolve()):
        raise OutputError(f"The output {out} would replace the model {source}", "Choose another -o")


def check_output(out: Path, needed_bytes: int, *, overwrite: bool) -> None:
    """Raise OutputError early if a folder could not be written at `out` later. needed_bytes: of the weights."""
    if out.is_symlink() or out.is_mount() or (out.exists() and not out.is_dir()):
        what = "a link" if out.is_symlink() else "a mount point" if out.is_mount() else "not a folder"
        raise OutputError(f"{out} exists and is {what}, which the result cannot replace", "Choose another -o")
    if out.is_dir() and any(out.iterdir()):
        try:
            read_config(out)
        except ModelError:
            problem = f"The folder {out} exists and contains something that is not a model"
            raise OutputError(problem, "Choose another -o") from None
        if not overwrite:
            raise OutputError(f"The folder {out} exists", "Choose another -o, or use --overwrite")
    check_place(out, needed_bytes)


def check_file(out: Path, needed_bytes: int, *, overwrite: bool) -> None:
    """Raise OutputError early if the file could not be written later."""
    if out.is_dir():
        raise OutputError(f"{out} is a folder", "Name the file to write")
    if out.exists() and not overwrite:
        raise OutputError(f"The file {out} exists", "Choose another -o, or use --overwrite")
    check_place(out, needed_bytes)


def check_records(folder: Path, *, overwrite: bool) -> None:
    """Raise OutputError early if the folder of records next to a file could not be written later."""
    if not folder.exists():
        return
    if not (folder / "manifest.json").is_file():
        raise OutputError(f"{folder} exists and has no records of a result", "Choose another -o")
    if not overwrite:
        raise OutputError(f"The folder {folder} exists", "Choose another -o, or use --overwrite")


def place_file(file: Path, out: Path) -> None:
    """Move a finished file to `out` atomically. Raises OutputError if that fails."""
    part = part_of(out)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, part)
        part.replace(out)
    except OSError as error:
        if file.exists():  # the part is an incomplete copy on another disk
            part.unlink(missing_ok=True)
        raise OutputError(f"{out} cannot be written ({error.strerror or error})", "Choose another -o") from error


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder next to `out` that replaces it if the block succeeds, and is deleted if not."""
    part = _beside(out, "part")
    try:
        part.mkdir(parents=True)
        yield part
        for path in [*part.rglob("*"), part]:
            _flush(path)
        place(part, out)
        _flush(out.absolute().parent)
    except (OSError, OutputError) as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error  # of a file inside
        reason = getattr(cause, "strerror", None) or cause
        raise OutputError(f"{out} cannot be written ({reason})", "Free some space, or choose another -o") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def place(folder: Path, out: Path) -> None:
    """Move a finished folder to `out` atomically; an old folder there is deleted only then.

    Raises OutputError if that fails; `folder` still exists then.
    """
    part, old = _beside(out, "part"), _beside(out, "old")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, part)
        if out.exists():
            out.rename(old)
        part.rename(out)
    except BaseException as error:
        if old.exists():
            old.rename(out)
        if folder.exists():  # the part is an incomplete copy on another disk
            shutil.rmtree(part, ignore_errors=True)
        elif part.exists():
            shutil.move(part, folder)
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
            reason = error.args[0][0][2]  # of the first file that was not copied
        raise OutputError(f"{out} cannot be written ({reason})", "Choose another -o") from error
    shutil.rmtree(old, ignore_errors=True)
    remove_leftovers(out)


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}-{uuid.uuid4().hex[:8]}")


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk, if the system supports that."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(out: Path) -> None:
    """Delete the temporary folders next to `out` of processes that were killed while they moved a result."""
    for what in ("part", "old"):
        for path in out.absolute().parent.glob(f".{glob.escape(out.name)}.{what}-{'[0-9a-f]' * 8}"):
            shutil.rmtree(path, ignore_errors=True)
