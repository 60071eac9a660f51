"""Settings of all tests, and what they share."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
from hypothesis import settings
from tests import found, texts

# How long an example takes says nothing about it on a busy machine.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")


OWN_DISCOVERY = ("tests/discovery", "tests/conformance")
OWN_TEXTS = "tests/data"
OWN_MEASURES = "tests/real"


def pytest_configure(config: pytest.Config) -> None:
    """One folder of what was found for the session, its workers and their processes."""
    # Processes that work together warn of each other's end on the stream of saap's own errors.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if found.FOLDER not in os.environ:
        os.environ[found.FOLDER] = folder = tempfile.mkdtemp(prefix="saap-found-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(autouse=True)
def work_is_done_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs do alike is done once, or little of it, except in the tests of just that."""
    path = request.node.path.as_posix()
    if not any(folder in path for folder in OWN_DISCOVERY):
        found.share(monkeypatch.setattr)
    if OWN_TEXTS not in path:
        texts.share(monkeypatch.setattr)
    if OWN_MEASURES not in path:
        texts.measure_little(monkeypatch.setattr)
