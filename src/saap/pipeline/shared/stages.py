"""The stages of pruning and of recovery, in order: what each is called, needs and gives, and what is kept of it.

Progress shows their titles, the manifest records them, the forecast goes through them, and an interrupted run looks for
their files in its work folder.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage. needs, gives: what it reads and makes, by name. MODEL and DATA come from the user.

    file: of its result in the work folder, of one target where it says so; '' if an interrupted run makes it again.
    """

    title: str
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    file: str = ""

    def file_of(self, target: str) -> str:
        """The name of its file for one target."""
        return self.file.format(target=target)

    @property
    def resumable(self) -> bool:
        """Whether an interrupted run finds what this stage has made."""
        return bool(self.file)


LOAD = Stage("load the model", ("MODEL",), ("model",))
READ_TEXT = Stage("read the calibration text", ("model", "DATA"), ("tokens",))
DISCOVER = Stage("discover the coupled structures", ("model",), ("graph",))
TIME_DECODING = Stage("measure what decoding costs", ("model", "graph"), ("budget",))
MEASURE_DENSE = Stage("measure the dense model", ("model", "tokens"), ("dense figures",), "dense.json")
WRITE_TEXT = Stage("let the model write text of its own", ("model",), ("written text",), "generated.npy")
ESTIMATE = Stage(
    "estimate the importance of every unit", ("model", "graph", "tokens"), ("scores",), "scores.safetensors"
)
FIND_COSTS = Stage("find the second-order cost of every unit", ("model", "graph", "tokens"), ("costs",))
SEARCH = Stage("search the structure", ("graph", "scores"), ("plan",), "plan-{target}.json")
WEIGH_TOKENS = Stage(
    "weigh every unit token by token", ("model", "graph", "tokens"), ("token scores",), "token_fisher.safetensors"
)
CUT = Stage("cut, block by block", ("model", "plan"), ("pruned model",), "model-{target}.json")
RESTORE = Stage(
    "cut and restore, block by block", ("model", "plan", "scores", "tokens"), ("pruned model",), "model-{target}.json"
)
MEASURE = Stage(
    "open the result and measure it", ("pruned model", "dense figures"), ("report",), "finished-{target}.json"
)
TIME_RESULT = Stage("measure the speed of the result", ("pruned model", "model"), ("speed",))

PRUNE = (
    LOAD, READ_TEXT, DISCOVER, TIME_DECODING, MEASURE_DENSE, WRITE_TEXT, ESTIMATE, FIND_COSTS, SEARCH, WEIGH_TOKENS,
    CUT, RESTORE, MEASURE, TIME_RESULT,
)  # fmt: skip
"""All stages of `saap prune`; a run leaves out those that its settings do not ask for."""

READ_RECORDS = Stage("read the model's records and the training data", ("MODEL", "DATA"), ("examples",))
LOAD_TEACHER = Stage("load the teacher", ("MODEL",), ("teacher",))
QUANTISE = Stage("quantise the weights", ("MODEL", "examples"), ("model",))
MEASURE_QUANTISED = Stage("measure the quantised model", ("model",), ("quantised figures",))
MEASURE_BEFORE = Stage("measure the model as it is", ("MODEL",), ("figures",))
TRAIN = Stage("train", ("model", "examples"), ("adapters",), "state.safetensors")
MERGE = Stage("merge and measure", ("model", "adapters"), ("tuned model",))
WRITE = Stage("write the result and open it", ("tuned model",), ("folder",))

RECOVER = (READ_RECORDS, LOAD_TEACHER, LOAD, QUANTISE, MEASURE_QUANTISED, MEASURE_BEFORE, TRAIN, MERGE, WRITE)
"""All stages of `saap recover`; the weights are either quantised while they are read or loaded as they are."""


def making(restores: bool) -> Stage:
    """The stage in which a model is made by its plan."""
    return RESTORE if restores else CUT
