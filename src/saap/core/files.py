"""Atomic writing of files: others see the old content or all of the new."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saap.core.errors import OutputError


def part_of(path: Path) -> Path:
    """Path of the new content of a file until it is complete."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def whole_file(path: Path, *, remedy: str = "Free some space there, or choose another place") -> Iterator[Path]:
    """A temporary file to write, which replaces `path` when the block succeeds and is deleted when it fails.

    Parent folders are created. Raises OutputError, with `remedy`, for errors of the operating system.
    """
    part = part_of(path)
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error})", remedy) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
