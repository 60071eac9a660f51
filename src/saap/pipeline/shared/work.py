"""The work folder: finished stages of a run, kept next to the output until the run succeeds."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from saap.core.errors import OutputError, StaleInputError
from saap.core.files import part_of
from saap.core.storage import write_whole
from saap.export.placing import remove_leftovers
from saap.models.walk.processes import Processes
from saap.models.walk.spill import SPILLED

SETTINGS, LOCK = "settings.json", "lock"
BEGUN = {part_of(Path(SETTINGS)).name, LOCK}
"""Files that a process leaves that is killed at its start."""


class WorkFolder:
    """Stage files of one run. A rerun with the same settings and model resumes; another run is rejected.

    path: None for a temporary folder.
    """

    def __init__(self, path: Path | None) -> None:
        self._temporary = path is None
        self.path = path if path is not None else Path(tempfile.mkdtemp(prefix="saap-"))
        if self._temporary:
            weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self._lock = FileLock(self.path / LOCK, blocking=False)

    @classmethod
    def shared(cls, path: Path | None, processes: Processes) -> WorkFolder:
        """The same folder in all processes; the first one creates a temporary folder."""
        made = cls(path) if processes.first else None
        where = processes.broadcast_result(lambda: None if made is None else made.path)
        return cls(where) if made is None else made

    def open(self, settings_digest: str) -> bool:
        """Create the folder, or resume an interrupted run. Returns whether the run resumes.

        Raises StaleInputError if the folder belongs to a run with other settings, OutputError if creation fails.
        """
        found = self.read_json(SETTINGS)
        if found is not None:
            digest = str(found.get("digest", "")) if isinstance(found, dict) else ""
            if digest != settings_digest:
                raise StaleInputError(
                    f"{self.path} has stages of a run with other settings or texts, another model or another "
                    f"version of saap (digest {digest[:12]}, this run has {settings_digest[:12]})",
                    "Delete that folder, or choose another --work-dir",
                )
            return True
        if self.path.exists() and not (self.path.is_dir() and all(file.name in BEGUN for file in self.path.iterdir())):
            raise OutputError(
                f"The work folder {self.path} exists and does not belong to a run", "Choose another --work-dir"
            )
        self.write_json(SETTINGS, {"digest": settings_digest})
        return False

    @contextmanager
    def alone(self, processes: Processes, stages: str = "*") -> Iterator[None]:
        """Context with a lock on the folder, which is released however this run ends.

        If it fails before it has any file to resume from, the folder is deleted: its settings would only reject other
        ones. stages: pattern of the names of such files. Raises OutputError in all processes if another run has the
        lock. File systems without locks allow both.
        """
        processes.broadcast_result(self._acquire)
        try:
            yield
        except BaseException:
            if processes.first and not self._has_files(stages):
                self.close(keep=False)
            raise
        finally:
            self._lock.release()

    def _has_files(self, stages: str) -> bool:
        """Whether a stage has left a file, other than activations."""
        files = (file for file in self.path.rglob(stages) if file.is_file() and file.suffix != SPILLED)
        return any(file.name not in {*BEGUN, SETTINGS} for file in files)

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            remedy = "Wait until it has ended, or choose another -o or --work-dir"
            raise OutputError(f"Another run is at work in {self.path}", remedy) from None
        except NotImplementedError:
            return

    def file(self, name: str) -> Path:
        """Path of a stage file."""
        return self.path / name

    def read_json(self, name: str) -> Any | None:
        """Content of a finished stage file, None if the stage has not finished. Raises StaleInputError if damaged."""
        path = self.file(name)
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except (ValueError, RecursionError):
            raise StaleInputError(f"{path} is damaged", "Delete the work folder and start again") from None

    def write_json(self, name: str, content: Any) -> None:
        """Write a stage file atomically."""
        write_whole(self.file(name), json.dumps(content, indent=1).encode())

    def close(self, *, keep: bool) -> None:
        """After success: delete the folder unless `keep`; a temporary folder is always deleted.

        It is renamed first, so that a partly deleted folder is never resumed.
        """
        if keep and not self._temporary:
            return
        going = self.path.with_name(f".{self.path.name}.old-{uuid.uuid4().hex[:8]}")
        with suppress(OSError):
            self.path.rename(going)
        shutil.rmtree(going, ignore_errors=True)
        remove_leftovers(self.path)
