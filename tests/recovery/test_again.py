"""Recoveries of what was tuned before, with other teachers, and after a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.pipeline import tiny

import saap
from saap.core.errors import ConfigurationError
from saap.core.manifest import RunManifest, read_manifest

QUICK: dict[str, Any] = {
    "max_seq_length": 32, "batch_size": 2, "max_steps": 2, "validate_every": 1, "validation_samples": 1, "rank": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text_file(tmp_path_factory.mktemp("text") / "text.txt", 6000)


def manifest_of(folder: Path) -> RunManifest:
    found = read_manifest(folder)
    assert found is not None
    return found


def test_a_model_that_was_only_tuned_has_no_default_teacher(dense: Path, text: Path, tmp_path: Path) -> None:
    full = {**QUICK, "data": [text], "tuning": "full"}
    once = tmp_path / "once"
    saap.recover(dense, out=once, **full)
    for name, more in (("alone", {}), ("taught", {"dense": str(dense)})):
        saap.recover(once, out=tmp_path / name, **full, **more)
        record = manifest_of(tmp_path / name).recovery
        assert record is not None
        teaches = name == "taught"
        assert (record.settings["teacher"], record.settings["distillation"]) == (
            (str(dense), 1) if teaches else (None, 0)
        )
        assert (record.validation_teacher is not None) == teaches
    with pytest.raises(ConfigurationError, match="--distillation has no teacher"):
        saap.recover(once, out=tmp_path / "more", **full, distillation=0.5)


def test_a_teacher_with_other_output_rows_is_refused_before_the_training(
    dense: Path, text: Path, tmp_path: Path
) -> None:
    padded = tiny.folder(tmp_path / "padded", vocab_size=tiny.VOCABULARY + 8)
    with pytest.raises(ConfigurationError, match=r"has 320 output rows, but its teacher .*padded 328.*--dense"):
        saap.recover(dense, data=[text], dense=str(padded), out=tmp_path / "tuned", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["padded"]
    saap.recover(dense, data=[text], dense=str(padded), distillation=0, out=tmp_path / "tuned", **QUICK)
