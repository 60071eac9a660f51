"""`saap demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from saap.cli.prune import Stages, prune
from saap.settings.presets import Preset
from saap.settings.prune import PruneConfig
from saap.settings.run import Display, RunOptions
from saap.settings.setting import Only

RATIO = 0.2
TOKENS = 20_480
"""For the reconstruction and the distillation: `fast` takes 36,864; the demo shows how it is done."""
FOLDER = Path("demo/smollm2-small")


def demo(
    config: Annotated[PruneConfig, Only(("preset",), {"pruning_ratios": RATIO, "preset": "fast"})],
    options: Annotated[RunOptions, Only(("out", "overwrite"), {"out": FOLDER})],
) -> None:
    """Prune a small real model (SmolLM2-135M from its Python wheel) by 20 % and show the result.

    A preset other than `fast` takes as much text as it does in `saap prune`.
    """
    typed = f"$ saap prune smollm2 --pruning-ratio {RATIO} --preset {config.preset}"
    if config.preset is Preset.FAST:
        config = config.model_copy(update={"refit_tokens": TOKENS})
        typed += f" --refit-tokens {TOKENS}"
    if options.out == FOLDER:  # its own from the last time
        options = options.model_copy(update={"overwrite": True})
    print(f"{typed} -o {options.out}" + " --overwrite" * options.overwrite, flush=True)
    prune("smollm2", config, Stages(), options, Display())
