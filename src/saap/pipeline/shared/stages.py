"""Stages of pruning and recovery in order: titles, and for pruning inputs, outputs and stage files.

Progress shows their titles and the manifest records them. `saap prune` and its forecast use the same steps, and a
resumed run executes only steps whose results are still needed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage. needs, gives: names of its inputs and its output, where the order of stages follows from them.

    MODEL and DATA come from the user. file: of its result in the work folder; '' if a resumed run repeats the stage.
    per_target: executed for each target, whose name is part of the file name.
    """

    title: str
    needs: tuple[str, ...] = ()
    gives: str = ""
    file: str = ""
    per_target: bool = False

    def file_of(self, target: str) -> str:
        """The name of its file for one target."""
        return self.file.format(target=target)


LOAD = Stage("load the model", ("MODEL",), "model")
READ_TEXT = Stage("read the calibration text", ("model", "DATA"), "tokens")
PRUNE_VOCABULARY = Stage("read the text and prune the vocabulary", READ_TEXT.needs, "tokens")
DISCOVER = Stage("discover the coupled structures", ("model",), "graph")
TIME_DECODING = Stage("measure what decoding costs", ("model", "graph"), "budget")
MEASURE_DENSE = Stage("measure the dense model", ("model", "tokens"), "dense figures", "dense.json")
ESTIMATE = Stage("estimate the importance of every unit", ("model", "graph", "tokens"), "scores", "scores.safetensors")
FIND_COSTS = Stage("estimate the importance and the second-order cost of every unit", ESTIMATE.needs, "costs")
KEEP_SCORES = Stage("keep the importance", ("costs",), "scores", ESTIMATE.file)
EVALUATE_DENSE = Stage("evaluate the dense model for the search", ("model", "tokens", "costs"), "evaluator")
SEARCH = Stage("search the structure", ("graph", "scores", "costs", "evaluator"), "plan", "plan-{target}.json", True)
CUT = Stage("cut, block by block", ("model", "plan", "scores"), "pruned model", "model-{target}.json", True)
RESTORE = Stage("cut and restore, block by block", (*CUT.needs, "tokens"), "pruned model", CUT.file, True)
MEASURE = Stage("open the result and measure it", ("pruned model", "tokens"), "figures", per_target=True)
TIME_RESULT = Stage("measure the speed of the result", ("model", "pruned model", "figures"), "speed", per_target=True)
PLACE = Stage(
    "put the result in its place",
    ("scores", "dense figures", "pruned model", "figures", "speed"), "result", "finished-{target}.json", True,
)  # fmt: skip

PREPARE = (LOAD, READ_TEXT, DISCOVER, TIME_DECODING)
"""Stages of `saap prune` before its work folder is opened; invalid inputs are rejected here."""
PRUNE = (
    *PREPARE, MEASURE_DENSE, ESTIMATE, FIND_COSTS, KEEP_SCORES, EVALUATE_DENSE, SEARCH, CUT, RESTORE,
    MEASURE, TIME_RESULT, PLACE,
)  # fmt: skip
"""All stages of `saap prune`; a run skips those that its settings do not request."""

# Stages of `saap recover`.
READ_RECORDS = Stage("read the model's records and the training data")
LOAD_TEACHER = Stage("load the teacher")
MEASURE_TEACHER = Stage("measure the teacher")
STORE_PREDICTIONS = Stage("store the teacher's predictions")
QUANTISE = Stage("quantise the weights")
MEASURE_QUANTISED = Stage("measure the quantised model")
MEASURE_BEFORE = Stage("measure the model as it is")
TRAIN = Stage("train")
MERGE = Stage("merge and measure")
WRITE = Stage("write the result and open it")


@dataclass(frozen=True, slots=True)
class Step:
    """A stage of one run, possibly for one target. detail: distinguishes several of the same title."""

    stage: Stage
    target: str = ""
    detail: str = ""

    @property
    def title(self) -> str:
        """The title of its stage with the detail."""
        return self.stage.title + (f" ({self.detail})" if self.detail else "")

    @property
    def gives(self) -> tuple[str, str]:
        """The name of its result, and the target of that."""
        return self.stage.gives, self.target

    @property
    def needs(self) -> set[tuple[str, str]]:
        """Its possible inputs: shared by all targets, or of its own."""
        return {(name, target) for name in self.stage.needs for target in ("", self.target)}


def steps_of(stages: Sequence[Stage], targets: Sequence[str]) -> list[Step]:
    """The steps of a run in order: consecutive per-target stages run target by target."""
    steps: list[Step] = []
    for each, group in groupby(stages, key=lambda stage: stage.per_target):
        row = list(group)
        for target in targets if each else [""]:
            steps += [Step(stage, target, target if len(targets) > 1 else "") for stage in row]
    return steps


def outstanding(steps: Sequence[Step], done: Collection[Step], wanted: Collection[str]) -> list[Step]:
    """Steps whose results are `wanted`, or needed by others that are not `done`; results of finished steps are read."""
    found: list[Step] = []
    needed = {(name, step.target) for name in wanted for step in steps}
    for step in reversed(steps):
        if step.gives in needed:
            found.append(step)
            needed |= set() if step in done else step.needs
    return found[::-1]
