"""Commands of experiments, in processes that find what runs of the session did alike."""

from __future__ import annotations

from collections.abc import Sequence

from lab import commands
from tests import found, texts


def run_here(words: Sequence[str]) -> str:
    """What a command of saap prints, run in this process, which ends with it."""
    found.share(setattr)
    texts.share(setattr)
    texts.measure_little(setattr)
    return commands.run_here(words)
