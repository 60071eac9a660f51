"""Every command that the README and the guides show is one that the command line accepts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from saap.cli.app import app

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT, ROOT / "docs", ROOT / "docs" / "guides", ROOT / "docs" / "method", ROOT / "examples")
PAGES = [page for folder in FOLDERS for page in sorted(folder.glob("*.md")) if page.name != "CHANGELOG.md"]
STARTS = r"(?:saap |torchrun [^`\n]*-m saap )"


def shown(page: Path) -> Iterator[str]:
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))  # one line each
    yield from re.findall(rf"^(?:    |\$ )({STARTS}.*)$", text, re.MULTILINE)
    yield from (span for span in re.findall(rf"`({STARTS}[^`\n]*)`", text) if "..." not in span and "…" not in span)


def words(command: str) -> list[str]:
    """Its arguments, without comments and what the shell redirects."""
    found = shlex.split(re.split(r" [<>|] ", command)[0], comments=True)
    return found[found.index("saap") + 1 :]


def fault(command: str) -> str:
    """What the command line says of it; prose may name a command with some of its flags only."""
    name, *arguments = words(command)
    if name in ("--help", "--version"):
        return ""
    known = app.get_command(click.Context(app), name)
    if known is None:
        return f"{command}: no such command"
    try:
        known.make_context(name, arguments or ["--help"])
    except (click.exceptions.Exit, click.MissingParameter, click.BadOptionUsage):
        return ""
    except click.UsageError as error:
        return f"{command}: {error.format_message()}"
    return ""


@pytest.mark.parametrize("page", [page for page in PAGES if any(shown(page))], ids=lambda page: page.stem)
def test_they_are_understood(page: Path) -> None:
    assert [said for said in map(fault, shown(page)) if said] == []


@pytest.mark.parametrize(
    "command",
    [
        "saap prune MODEL --ratio 0.2", "saap shrink MODEL", "saap prune MODEL small",
        "torchrun --nproc-per-node 2 -m saap prune MODEL --ratio 0.2",
    ],
)  # fmt: skip
def test_a_wrong_one_is_seen(command: str) -> None:
    assert fault(command)
