"""A reporter that remembers what a run says."""

from __future__ import annotations

from saap.pipeline.shared.progress import Silent


class Noted(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
