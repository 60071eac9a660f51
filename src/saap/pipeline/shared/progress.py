"""Progress reporting: drawn by the command line, silent by default in Python."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives the progress of a run."""

    def stage(self, title: str) -> None:
        """A new stage begins."""
        return

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` steps of the current stage are finished."""
        return

    def note(self, text: str) -> None:
        """A line of information."""
        return


class Silent(Reporter):
    """Reports nothing."""
