"""Commands in several processes that `torchrun` or `accelerate launch` started: the first one speaks for all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NoReturn

from saap.core.errors import ConfigurationError

COMMANDS = ("prune", "recover")


def started_several() -> bool:
    """Whether this process is one of several. Needs no heavy import."""
    return os.environ.get("WORLD_SIZE", "1").strip() not in ("", "0", "1")


def speaks() -> bool:
    """Whether this process prints: the only one, or the first."""
    return not started_several() or os.environ.get("RANK", "0").strip() == "0"


@contextmanager
def one_of_several(arguments: Sequence[str]) -> Iterator[None]:
    """One of several processes: silent unless it is the first, and all fail if one fails.

    Raises ConfigurationError for a command that several processes cannot share.
    """
    if not started_several():
        yield
        return
    from saap.models.walk.processes import together

    with Path(os.devnull).open("w") as nowhere:
        out, err = (sys.stdout, sys.stderr) if speaks() else (nowhere, nowhere)
        with redirect_stdout(out), redirect_stderr(err), together():
            command = next((word for word in arguments if not word.startswith("-")), None)
            if command is not None and command not in COMMANDS:
                raise ConfigurationError(
                    f"`saap {command}` runs in one process", "Start it without torchrun or accelerate launch"
                )
            yield


def leave(code: int, message: str = "") -> NoReturn:
    """End this process; `message` is said by the first one, which the others outlive.

    A launcher ends all processes as soon as one of them has failed.
    """
    if message and speaks():
        print(message, file=sys.stderr, flush=True)
    if code and started_several():
        from saap.models.walk.processes import end_together

        with suppress(Exception):
            end_together()
    sys.exit(code)
