"""Digests of the inputs of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.pipeline import tiny

from saap.models.loading.references import resolve_model
from saap.pipeline.shared.digests import model_digest, named_files, tree_digest


def test_words_that_are_names_of_files_by_chance_are_not_digested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("saap", "code"):
        (tmp_path / name).mkdir()
    for name in ("text.txt", "prompts.txt"):
        (tmp_path / name).write_text(name)
    settings = {
        "method": "saap",
        "calibration": ["code", "text.txt", "missing.txt", "a text, longer than a name. " * 20],
        "speed": {"prompts": "prompts.txt"},
    }
    assert sorted(named_files({**settings, "plan": None})) == ["prompts.txt", "text.txt"]


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.model", "merges.txt", "modeling_own.py"])
def test_a_model_is_more_than_its_weights(tmp_path: Path, name: str) -> None:
    resolved = resolve_model(tiny.folder(tmp_path))
    before = model_digest(resolved)
    (resolved.folder / "README.md").write_text("A model card tells nothing.")
    assert model_digest(resolved) == before
    (resolved.folder / name).write_text("x")
    assert model_digest(resolved) != before


def test_what_other_programs_leave_in_a_folder_does_not_change_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = tree_digest(tmp_path)
    for name in ("__pycache__/code.pyc", ".DS_Store", "saap/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert tree_digest(tmp_path) == before
    (tmp_path / "config.json").write_text("[]")
    assert tree_digest(tmp_path) != before
