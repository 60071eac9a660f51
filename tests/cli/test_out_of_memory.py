"""A device whose memory ends in the middle of a run."""

from __future__ import annotations

import sys

import pytest
import torch

from saap.cli import app
from saap.core.errors import failure_of


def _ends(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(app, "app", fail)
    monkeypatch.setattr(sys, "argv", ["saap", "prune"])
    app.main()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_one_sentence_says_what_to_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        _ends(monkeypatch, error)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: Out of memory: ")
    assert said.count("\n") == 1
    assert "--max-memory" in said


def test_other_failures_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        _ends(monkeypatch, RuntimeError("shapes do not fit"))


def test_it_is_no_fault_of_the_model() -> None:
    assert failure_of(ValueError("sizes differ\nmore")) == "ValueError: sizes differ"
    with pytest.raises(torch.OutOfMemoryError):
        failure_of(torch.OutOfMemoryError("CUDA out of memory."))
