"""Commands in several processes started by `torchrun` or `accelerate launch`: only the first one prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NoReturn

from saap.core.errors import ConfigurationError, ProcessError

COMMANDS = ("prune", "recover")


def started_several() -> bool:
    """Whether this process is one of several. Needs no heavy import."""
    return os.environ.get("WORLD_SIZE", "1").strip() not in ("", "0", "1")


@contextmanager
def one_of_several(arguments: Sequence[str]) -> Iterator[None]:
    """Silence this process if it is one of several and not the first.

    A command that several processes cannot share ends each of them; the first one says why.
    """
    if not started_several():
        yield
        return
    first = os.environ.get("RANK", "0").strip() == "0"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch warns about each process that ends early
    with Path(os.devnull).open("w") as nowhere:
        out, err = (sys.stdout, sys.stderr) if first else (nowhere, nowhere)
        with redirect_stdout(out), redirect_stderr(err):
            command = next((word for word in arguments if not word.startswith("-")), None)
            trial = " --dry-run" if "--dry-run" in arguments else ""
            if command is not None and (trial or command not in COMMANDS):
                remedy = "Start it without torchrun or accelerate launch"
                print(f"error: {ConfigurationError(f'`saap {command}{trial}` runs in one process', remedy)}", file=err)
                sys.exit(2)
            try:
                yield
            except ProcessError:
                if first:
                    raise
                sys.exit(2)  # the failed process or the first one reports the error


def leave(code: int, message: str) -> NoReturn:
    """End this process with `message`; if several fail together, only one prints it."""
    speaks = True
    if started_several():
        from saap.models.walk.processes import first_to_fail

        speaks = first_to_fail()
    if speaks:
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)
