"""`saap inspect`."""

from __future__ import annotations

from typing import Annotated

from saap.cli.flags import Model
from saap.settings.run import Display, RunOptions
from saap.settings.setting import Only


def inspect(
    model: Model,
    options: Annotated[RunOptions, Only(("revision", "trust_remote_code"))],
    display: Annotated[Display, Only(("as_json",))],
) -> None:
    """Show the coupled structures of MODEL: per role the groups, their units, members and parameters."""
    from saap.cli.show.output import print_structures, show
    from saap.pipeline.prune.run import inspect_model

    found = inspect_model(model, options)
    show(display, found, lambda: print_structures(found))
