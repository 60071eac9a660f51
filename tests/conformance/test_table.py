"""The page about the families says what is so."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from tests.conformance.table import document

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_page_is_what_the_command_writes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    version = ".".join(transformers.__version__.split(".")[:2])
    if f"with transformers {version};" not in text:
        pytest.skip("the page was made with another version of transformers")
    assert text == document()
    assert "| NO |" not in text
