"""The work folder: finished stages of a run, kept beside the output until the run succeeds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from saap.errors import OutputError, StaleInputError

_SETTINGS = "settings.json"


class WorkFolder:
    """Stage files of one run. A rerun with the same settings and model finds them; another run is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, settings_digest: str) -> bool:
        """Create the folder, or take up an interrupted run. Returns whether there is something to take up.

        Raises StaleInputError if the folder belongs to a run with other settings, OutputError if it cannot be made.
        """
        marker = self.path / _SETTINGS
        if marker.exists():
            found = json.loads(marker.read_text()).get("digest", "")
            if found != settings_digest:
                raise StaleInputError(
                    f"{self.path} holds stages of a run with other settings or another model "
                    f"(digest {str(found)[:12]}, this run has {settings_digest[:12]})",
                    "Delete that folder, or choose another --work-dir",
                )
            return True
        if self.path.exists() and any(self.path.iterdir()):
            raise OutputError(f"work folder {self.path} exists and was not made by a run", "Choose another --work-dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"work folder {self.path} cannot be written ({error.strerror})", "Choose another --out or --work-dir"
            ) from error
        self.write_json(_SETTINGS, {"digest": settings_digest})
        return False

    def file(self, name: str) -> Path:
        """Path of a stage file."""
        return self.path / name

    def read_json(self, name: str) -> Any | None:
        """Content of a finished stage file, None if the stage has not finished."""
        path = self.file(name)
        return json.loads(path.read_text()) if path.exists() else None

    def write_json(self, name: str, content: Any) -> None:
        """Write a stage file at once or not at all."""
        temporary = self.file(name + ".tmp")
        temporary.write_text(json.dumps(content, indent=1))
        os.replace(temporary, self.file(name))

    def remove(self) -> None:
        """Delete the folder with all stage files."""
        shutil.rmtree(self.path, ignore_errors=True)
