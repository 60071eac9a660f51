"""The declared list of stages."""

from __future__ import annotations

import pytest

from saap.pipeline.shared.stages import PRUNE, RECOVER, Stage


@pytest.mark.parametrize("stages", [PRUNE, RECOVER], ids=["prune", "recover"])
def test_a_stage_needs_what_earlier_ones_give(stages: tuple[Stage, ...]) -> None:
    known = {"MODEL", "DATA"}
    for stage in stages:
        assert set(stage.needs) <= known, stage.title
        known |= set(stage.gives)
    assert len({stage.title for stage in stages}) == len(stages)


def test_what_takes_long_is_kept_for_an_interrupted_run() -> None:
    kept = [stage.title for stage in PRUNE if stage.resumable]
    assert {"estimate the importance of every unit", "search the structure"} <= set(kept)
    files = {stage.file for stage in PRUNE if stage.resumable}
    assert len(files) == len(kept) - 1  # a model is made with or without restoration
