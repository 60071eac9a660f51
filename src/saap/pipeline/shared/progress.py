"""How a run tells what it is doing; the command line draws it, the Python API is silent unless asked."""

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
        """A fact worth a line."""
        return


class Silent(Reporter):
    """Reports nothing."""
