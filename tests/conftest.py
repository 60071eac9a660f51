"""Settings of all tests, and what they share."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
from hypothesis import settings
from tests import found

# How long an example takes says nothing about it on a busy machine.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")


OWN_DISCOVERY = ("tests/discovery", "tests/conformance", "tests/real")


def pytest_configure(config: pytest.Config) -> None:
    """One folder of structures for the session, its workers and their processes."""
    if found.FOLDER not in os.environ:
        os.environ[found.FOLDER] = folder = tempfile.mkdtemp(prefix="saap-found-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(autouse=True)
def structures_are_found_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the same modules, shapes and configuration are discovered once, except in tests of discovery."""
    if not any(folder in request.node.path.as_posix() for folder in OWN_DISCOVERY):
        found.share(monkeypatch)
