"""`saap prune --check`: the result is opened in other programs, and its card shows the code that ran."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
from tests.command import run
from tests.export.gguf_models import adaptive_folder
from tests.pipeline import tiny

from saap.core.manifest import read_manifest
from saap.export.consumers import _version
from saap.models.loading.pretrained import load
from saap.pipeline.export.check import check_in_consumers
from saap.pipeline.shared.progress import Silent
from saap.settings.registry import Consumer

BOTH = (Consumer.TRANSFORMERS, Consumer.LLAMA_CPP)


def test_the_card_shows_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {0: tuple(range(64)), 1: tuple(range(32))}
    folder = adaptive_folder(tmp_path, "llama", ffn=kept, attention={})
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)  # as torchrun does, whose process a consumer is not
    opened = check_in_consumers(folder, BOTH, Silent())
    assert [(one.consumer, one.error) for one in opened] == [("transformers", None), ("llama.cpp", None)]
    assert opened[0].written.startswith("The capital of France is")
    assert opened[1].written.startswith("checked in llama.cpp")
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.opened == opened
    card = (folder / "README.md").read_text()
    assert all(one.code in card and f"{one.consumer} {one.version}" in card for one in opened)
    assert str(tmp_path) not in card + (folder / "saap" / "manifest.json").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_program_that_fails_changes_nothing_else(tmp_path: Path) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={0: (1, 2)}, attention={})
    (folder / "tokenizer.json").write_text("{")
    opened = check_in_consumers(folder, BOTH, Silent())
    assert all("Expecting property name" in str(one.error) for one in opened)
    assert "it was opened with" not in (folder / "README.md").read_text()
    assert load(folder, device="cpu") is not None


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    tiny.folder(tmp_path / "model")
    tiny.text_file(tmp_path / "text.txt")
    text = ["--calibration", str(tmp_path / "text.txt"), "--num-samples", "4"]
    return ["prune", str(tmp_path / "model"), "--pruning-ratio", "0.3", *text, "--device", "cpu", "-o"]


def test_the_command(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = run(capsys, *arguments, tmp_path / "out", "--check", "transformers", "--json", "--quiet")
    assert code == 0, error
    shown = json.loads(out)
    assert [one["error"] for one in shown["opened"]] == [None]
    assert shown["opened"][0]["code"] in (tmp_path / "out" / "README.md").read_text()


def test_a_program_that_is_not_installed_is_refused_before_the_pruning(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    code, _, error = run(capsys, *arguments, tmp_path / "out", "--check", "transformers,vllm")
    assert (code, "vllm needs the package vllm. Run saap where vllm is installed." in error) == (2, True)
    assert not (tmp_path / "out").exists()


def test_the_version_is_that_of_the_build_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"vllm": ["torch", "other"]})
    assert _version(Consumer.VLLM) == importlib.metadata.version("torch")
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"vllm": ["no-such-package"]})
    assert _version(Consumer.VLLM) == ""
