"""The command line that a record was made by."""

from __future__ import annotations

import sys
from pathlib import Path


def typed_command() -> tuple[str, ...]:
    """The arguments of `saap` as typed, if this process is the command line, else none.

    That is the program `saap`, or what `python -m saap` runs, also under torchrun or accelerate launch.
    """
    program = Path(sys.argv[0])
    is_ours = program.stem == "saap" or program.parts[-2:] == ("saap", "__main__.py")
    return tuple(sys.argv[1:]) if is_ours else ()
