"""The declared list of stages, and the folder of their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from saap.models.walk.processes import Processes
from saap.pipeline.shared.stages import (
    CUT,
    ESTIMATE,
    MEASURE,
    PLACE,
    PRUNE,
    RESTORE,
    SEARCH,
    outstanding,
    steps_of,
)
from saap.pipeline.shared.work import WorkFolder


def test_a_stage_needs_what_earlier_ones_give() -> None:
    known = {"MODEL", "DATA"}
    for stage in PRUNE:
        assert set(stage.needs) <= known, stage.title
        known.add(stage.gives)
    assert len({stage.title for stage in PRUNE}) == len(PRUNE)


def test_what_takes_long_is_kept_for_an_interrupted_run() -> None:
    kept = [stage.title for stage in PRUNE if stage.file]
    assert {"estimate the importance of every unit", "search the structure"} <= set(kept)
    files = {stage.file for stage in PRUNE if stage.file}
    # scores are found with or without second-order costs, and a model is made with or without restoration
    assert len(files) == len(kept) - 2


def test_an_interrupted_run_carries_out_what_is_still_needed() -> None:
    steps = steps_of([stage for stage in PRUNE if stage is not CUT], ["0.1", "0.3"])
    shared = [step.stage for step in steps if not step.target]
    assert shared == [stage for stage in PRUNE if not stage.per_target]
    assert [step.target for step in steps if step.stage is RESTORE] == ["0.1", "0.3"]
    finished = [step for step in steps if (step.stage, step.target) == (PLACE, "0.1")]
    made = [step for step in steps if (step.stage, step.target) == (RESTORE, "0.3")]
    left = outstanding(steps, [*finished, *made], ["result"])
    assert {step.stage for step in left if step.target == "0.1"} == {PLACE}
    assert SEARCH not in {step.stage for step in left}
    assert {ESTIMATE, RESTORE, MEASURE} <= {step.stage for step in left}
    assert outstanding(steps, steps, ["result"]) == [step for step in steps if step.stage is PLACE]


@pytest.mark.parametrize(
    ("file", "stages", "stays"),
    [
        ("settings.json", "*", False), ("spill/0.spill", "*", False), ("estimation/finished.safetensors", "*", True),
        ("plan.json", "*", True), ("best.safetensors", "state.safetensors", False),
    ],
)  # fmt: skip
def test_a_failure_leaves_a_work_folder_only_where_there_is_something_to_resume(
    tmp_path: Path, file: str, stages: str, stays: bool
) -> None:
    work = WorkFolder(tmp_path / "work")
    work.open("one")
    work.file(file).parent.mkdir(exist_ok=True)
    work.file(file).touch()
    with pytest.raises(KeyboardInterrupt), work.alone(Processes(), stages):
        raise KeyboardInterrupt
    assert work.path.exists() is stays
    assert len(list(tmp_path.iterdir())) == stays
