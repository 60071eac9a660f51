"""`saap demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from saap.cli.prune import Stages, prune
from saap.settings.prune import PruneConfig
from saap.settings.run import Display, RunOptions
from saap.settings.setting import Only

RATIO = 0.2


def demo(
    config: Annotated[PruneConfig, Only(("preset",), {"pruning_ratios": RATIO, "preset": "fast"})],
    options: Annotated[RunOptions, Only(("out",), {"out": Path("demo/smollm2-small"), "overwrite": True})],
) -> None:
    """Prune a small real model (SmolLM2-135M from its Python wheel) by 20 % and show the result."""
    typed = f"$ saap prune smollm2 --pruning-ratio {RATIO} --preset {config.preset} -o {options.out} --overwrite"
    print(typed, flush=True)
    prune("smollm2", config, Stages(), options, Display())
