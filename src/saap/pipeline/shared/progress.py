"""How a run tells what it is doing; the command line draws it, the Python API is silent unless asked."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives the progress of a run."""

    def stage(self, title: str) -> None:
        """A new stage begins."""

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` steps of the current stage are finished."""

    def note(self, text: str) -> None:
        """A fact worth a line."""


class Silent:
    """Reports nothing."""

    def stage(self, title: str) -> None:
        """Ignore the stage."""

    def advance(self, done: int, total: int) -> None:
        """Ignore the progress."""

    def note(self, text: str) -> None:
        """Ignore the note."""
