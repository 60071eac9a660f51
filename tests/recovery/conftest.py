"""A dense model and a text, which the tests of a module share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.pipeline import tiny


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text_file(tmp_path_factory.mktemp("text") / "text.txt", 20000)
