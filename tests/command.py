"""The command line in this process."""

from __future__ import annotations

import sys

import pytest

from saap.cli import app as cli


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `saap` with these arguments."""
    sys.argv = ["saap", *map(str, arguments)]
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err
