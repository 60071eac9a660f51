"""`saap inspect`."""

from __future__ import annotations

import json
from typing import Annotated

from saap.cli.flags import Model
from saap.settings.run import READS, Display, RunOptions
from saap.settings.setting import Only


def inspect(
    model: Model,
    options: Annotated[RunOptions, Only(READS, {"device": "cpu"})],
    display: Annotated[Display, Only(("as_json",))],
) -> None:
    """Show the coupled structures of MODEL: per role the groups, their units, members and parameters."""
    from saap.cli.show.output import print_structures
    from saap.pipeline.prune.run import inspect_model

    shown = inspect_model(model, options)
    print(json.dumps(shown, indent=1)) if display.as_json else print_structures(shown)
