"""The README is short, and what its table says runs on a tiny model as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests import command, texts
from tests.pipeline import tiny
from tests.site.test_shown_commands import words

README = Path(__file__).parents[2] / "README.md"
LITTLE = ("--num-samples", "4", "--sample-length", "32", "--preset", "fast")
SMALLER = {"100M": "40k", "8GB": "100GB"}
"""What does not fit a tiny model, and what does."""
ROWS = {
    "see time, memory and disk first": "", "reach a size": "", "keep what the model is for": "",
    "remove half of the experts of Qwen3-30B-A3B": "experts",
    "prune a model that does not fit the memory": "",
}  # fmt: skip
"""Rows that are cheap to carry out, and the model that they need."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {"": tiny.folder(folder / "tiny"), "experts": tiny.mixture_folder(folder / "experts")}


def test_it_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("row", ROWS)
def test_the_table_can_be_carried_out(
    row: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    said = re.search(rf"^\| {row} \|.*?`(saap prune [^`]*)`", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert said
    texts.measure_little(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-text.jsonl").write_text('{"text": "A sentence about what the model is for."}\n' * 400)
    named = {"MODEL": str(sources[ROWS[row]]), **SMALLER}
    little = LITTLE if "--no-restore" in said[1] else (*LITTLE, "--refit-tokens", "1024")
    code, out, errors = command.run(capsys, *(named.get(word, word) for word in words(said[1])), *little)
    assert code == 0, errors
    assert (tmp_path / "small").is_dir() != ("--dry-run" in said[1])
    assert out
