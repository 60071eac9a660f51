"""Settings of `saap compare`."""

from functools import partial
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from saap.settings.evaluate import EvalRequest
from saap.settings.prune import MethodChoice, PrunableRole, PruneConfig, Ratio
from saap.settings.registry import Method
from saap.settings.setting import Commas, Different, Filled, Flag, Only, Seed, Settings

compared_flag = partial(Flag, panel="Comparison")
FIVE_METHODS = "saap,llm-pruner-element2,flap,wanda-sp,magnitude"


def _restorations(given: Any) -> Any:
    """Parse both, yes or no as a tuple of booleans."""
    known = {"both": (False, True), "yes": (True,), "no": (False,)}
    if isinstance(given, str) and given not in known:
        raise ValueError("is unknown", f"It takes {', '.join(known)}")
    return known[given] if isinstance(given, str) else given


class CompareRequest(Settings):
    """Settings of a comparison.

    methods: each with the roles that it may prune, None for the configuration's. config: of the method under test; its
    calibration and ratios apply to all methods. restorations: False only cuts (FLAP adds its biases), True also
    reconstructs. evaluation: the texts and tasks to measure on. task_ratios: None for all of them; tasks take far
    longer than perplexity.
    """

    methods: Annotated[
        tuple[MethodChoice, ...],
        Commas,
        Different,
        Filled,
        compared_flag(
            "Methods, each METHOD or METHOD@ROLE+ROLE for these roles only.", metavar="M[,M...]", default=FIVE_METHODS
        ),
    ] = Field(default_factory=lambda: tuple(MethodChoice(method=Method(name)) for name in FIVE_METHODS.split(",")))
    config: Annotated[
        PruneConfig,
        Only(
            (
                "pruning_ratios", "calibration", "samples", "sample_length", "refit_tokens", "bos", "roles", "align",
                "preset",
            ),
            {"pruning_ratios": "0.1,0.2,0.3"},
        ),
    ]  # fmt: skip
    seeds: Annotated[
        tuple[Seed, ...],
        Commas,
        Different,
        Filled,
        compared_flag("Seeds of the calibration samples.", metavar="N[,N...]"),
    ] = (0,)
    restorations: Annotated[
        tuple[bool, ...], BeforeValidator(_restorations), Filled, compared_flag(
            "Least-squares reconstruction by saap for every method: both, yes or no.", name="restore",
            metavar="both|yes|no", default="both",
        ),
    ] = (False, True)  # fmt: skip
    evaluation: Annotated[
        EvalRequest,
        Only(
            ("texts", "window", "bos", "max_tokens", "tasks", "task_data", "limit", "rounded"), {"texts": ("bundled",)}
        ),
    ]
    task_ratios: Annotated[
        tuple[Ratio, ...] | None,
        Commas,
        BeforeValidator(lambda given: () if given == "none" else given),
        compared_flag("Run the tasks at these ratios only, or `none`.", metavar="R[,R...]", default="at all"),
    ] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if PrunableRole.VOCABULARY in self.config.roles:
            raise ValueError("--roles vocabulary is not compared", "Leave vocabulary out")
        if self.task_ratios and not self.evaluation.tasks:
            raise ValueError("--task-ratios changes nothing without --tasks", "Add --tasks, or leave it out")
        return self

    def asks_tasks(self, ratio: float) -> bool:
        """Whether tasks are run on a model pruned by `ratio`."""
        return bool(self.evaluation.tasks) and (self.task_ratios is None or ratio in self.task_ratios)
