from __future__ import annotations

import pytest
from lab import commands
from tests.book.commands import run_here


@pytest.fixture(autouse=True)
def commands_share_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "run_here", run_here)
