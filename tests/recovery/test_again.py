"""Recoveries of what was tuned before, with other teachers, and after a failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.noted import Noted
from tests.pipeline import tiny

import saap
from saap.core.errors import ConfigurationError, GroupSizeError, OutputError, VerificationError
from saap.core.manifest import Opening, RunManifest, read_manifest
from saap.export.huggingface import write_records
from saap.pipeline.recover import run as recovery_run
from saap.recovery.train import Trainer, Training

QUICK: dict[str, Any] = {
    "max_seq_length": 32, "batch_size": 2, "max_steps": 2, "validate_every": 1, "validation_samples": 1,
}  # fmt: skip


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


def test_a_manifest_says_nothing_of_the_files_that_were_tuned(dense: Path, text: Path, tmp_path: Path) -> None:
    full = {**QUICK, "data": [text], "tuning": "full"}
    once, twice = tmp_path / "once", tmp_path / "twice"
    saap.recover(dense, out=once, **full)
    before = manifest_of(once)
    opening = Opening(consumer="transformers", version="5.0", code="opened()")
    write_records(once, before.model_copy(update={"opened": (opening,)}))
    saap.recover(once, out=twice, dtype="bfloat16", **full)
    after = manifest_of(twice)
    assert "opened" not in (twice / "README.md").read_text()
    assert after.opened == ()
    assert (before.dtype, after.dtype) == ("float32", "bfloat16")
    assert after.bytes.before == after.bytes.after == 2 * after.parameters.after == before.bytes.after / 2


@contextmanager
def failing_in(step: int) -> Iterator[None]:
    """Context in which the memory ends in this step of each training, counted from 1."""
    whole = Trainer._step

    def steps(self: Trainer, training: Training) -> tuple[float, float, int]:
        if training.step + 1 == step:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, training)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "_step", steps)
        yield


def test_a_training_resumes_with_settings_that_take_less_memory(dense: Path, text: Path, tmp_path: Path) -> None:
    out, notes = tmp_path / "tuned", Noted()
    with failing_in(2), pytest.raises(torch.OutOfMemoryError):
        saap.recover(dense, data=[text], out=out, micro_batch_size=2, gradient_checkpointing=False, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.saap-work"]
    result = saap.recover(dense, data=[text], out=out, reporter=notes, micro_batch_size=1, **QUICK)
    assert [note for note in notes.notes if "resuming" in note] == ["resuming after step 1"]
    assert [point.step for point in result.training.points] == [1, 2]


def test_a_training_that_fails_before_its_first_state_leaves_nothing(dense: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    with failing_in(1), pytest.raises(torch.OutOfMemoryError):
        saap.recover(dense, data=[text], out=out, **QUICK)
    assert list(tmp_path.iterdir()) == []
    saap.recover(dense, data=[text], out=out, **{**QUICK, "batch_size": 1})


def test_a_disk_without_space_for_the_state_is_refused_before_the_training(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {**QUICK, "data": [text], "tuning": "full", "work_dir": tmp_path / "work"}
    needed: list[int] = []
    check = recovery_run.check_place

    def little_space(out: Path, needed_bytes: int, flag: str) -> None:
        needed.append(needed_bytes)
        check(out, needed_bytes + 2**60, flag)

    with monkeypatch.context() as patched:
        patched.setattr(recovery_run, "check_place", little_space)
        patched.setattr(Trainer, "run", None)
        with pytest.raises(OutputError, match=r"state\.safetensors needs .* free.*--work-dir"):
            saap.recover(dense, **full)
    assert list(tmp_path.iterdir()) == []
    inside = sum(value.numel() for name, value in saap.load(dense).named_parameters() if ".layers." in name)
    assert needed == [pytest.approx(28 * inside, rel=0.01)]


def test_a_folder_that_differs_from_memory_is_not_put_in_its_place(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = {**QUICK, "data": [text], "tuning": "full", "out": tmp_path / "tuned"}
    with monkeypatch.context() as patched:
        patched.setattr(recovery_run, "TOLERANCE", 0.0)
        with pytest.raises(VerificationError, match="--dtype float32"):
            saap.recover(dense, dtype="bfloat16", **full)
    assert not (tmp_path / "tuned").exists()
    notes = Noted()
    saap.recover(dense, dtype="float32", reporter=notes, **full)
    assert "resuming after step 2" in notes.notes


def test_groups_that_do_not_fit_are_refused_before_the_predictions_of_the_teacher(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_run, "load_teacher", None)
    given: dict[str, Any] = {"data": [text], "teacher": dense, "teacher_logits": tmp_path / "logits", **QUICK}
    with pytest.raises(GroupSizeError, match="128 does not divide"):
        saap.recover(dense, out=tmp_path / "tuned", group_size=128, **given)
    assert list(tmp_path.iterdir()) == []
