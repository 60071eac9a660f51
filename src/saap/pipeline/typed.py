"""The command line that a record was made by."""

from __future__ import annotations

import sys
from pathlib import Path


def typed_command() -> tuple[str, ...]:
    """The arguments as typed, if this process is the command line (`saap`, or `python -m saap.cli`), else none."""
    program = Path(sys.argv[0])
    is_ours = program.stem == "saap" or program.parts[-2:] == ("saap", "cli.py")
    return tuple(sys.argv[1:]) if is_ours else ()
