"""The order of the stages: the only place where it is written."""

from __future__ import annotations

from dataclasses import dataclass

from saap.pipeline.inputs import RunOptions

from saap.search import (
    Budget,
)

__all__ = ["RunOptions", "Target", "inspect_model", "preview", "run_prune"]


@dataclass(frozen=True, slots=True)
class Target:
    """One result that was asked for. name: of its folder and stage files."""

    name: str
    budget: Budget | None
