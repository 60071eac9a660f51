"""The dense model beside a pruned one: the right revision, nothing downloaded unasked, no code of its own run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from tests.command import run
from tests.pipeline import tiny

from saap.cli import app as cli

FAST = ["--effort", "fast", "--samples", "4", "--sample-length", "32", "--no-restore"]
NAME = "some/dense"
TEXT = ["--perplexity", "bundled", "--window", "32", "--max-tokens", "65"]
SHORT = ["--length", "32", "--max-steps", "1", "--validation-samples", "1", "--group-size", "16", "--rank", "2"]
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "of_its_own"

class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub in which `some/dense` has two revisions."""
    cache = tmp_path_factory.mktemp("hub")
    at = cache / f"models--{NAME.replace('/', '--')}"
    (at / "refs").mkdir(parents=True)
    for digit, ref in (("a", "main"), ("b", "old")):
        (at / "refs" / ref).write_text(digit * 40)
        folder = tiny.folder(at / "snapshots" / (digit * 40), num_hidden_layers=2)
        if ref == "old":
            weights = load_file(folder / "model.safetensors")
            save_file({n: 3 * w for n, w in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return cache


def unreachable(*_: object, **__: object) -> None:
    raise OfflineModeIsEnabled


@pytest.fixture
def asked(made: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The hub is that cache; what would be asked of the real one is noted down."""
    questions: list[Any] = []

    def noted(*_: object, repo_id: str, **__: object) -> None:
        questions.append(repo_id)
        unreachable()

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", noted)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(made))
    return questions


@pytest.fixture(scope="module")
def small_once(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was pruned from the revision `old`."""
    out = tmp_path_factory.mktemp("pruned") / "small"
    ratio = ["--pruning-ratio", "0.2", "--align", "16", "--calibration", "novels"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(made))
        patch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
        words = ["saap", "prune", NAME, "--revision", "old", *ratio, *FAST, "--out", str(out), "--quiet"]
        patch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
    return out


@pytest.fixture
def small(small_once: Path, asked: list[Any]) -> Path:
    return small_once


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, error = run(capsys, "eval", *arguments, "--json")
    assert code == 0, error
    return dict(json.loads(out), notes=error)


def value(report: dict[str, Any]) -> float:
    return float(report["perplexity"]["bundled"]["value"])


def test_the_revision_of_the_model_is_not_that_of_the_dense_one(
    capsys: pytest.CaptureFixture[str], small: Path
) -> None:
    of_main, of_old = (value(evaluated(capsys, NAME, *TEXT, "--revision", ref)) for ref in ("main", "old"))
    assert abs(of_main - of_old) > 1e-3
    beside = evaluated(capsys, NAME, *TEXT, "--revision", "old", "--dense", NAME)
    assert (value(beside), value(beside["dense"])) == (of_old, of_main)
    beside = evaluated(capsys, NAME, *TEXT, "--dense", NAME, "--dense-revision", "old")
    assert (value(beside), value(beside["dense"])) == (of_main, of_old)
    beside = evaluated(capsys, small, *TEXT, "--dense", NAME)  # as the manifest says
    assert value(beside["dense"]) == of_old
    beside = evaluated(capsys, small, *TEXT, "--dense", NAME, "--dense-revision", "main")
    assert value(beside["dense"]) == of_main


def test_the_manifest_says_which_revision_is_the_dense_one(
    capsys: pytest.CaptureFixture[str], small: Path, asked: list[Any], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The house\n")
    writing = ["--prompts", prompts, "--tokens", "6"]
    alone = evaluated(capsys, NAME, *writing, "--revision", "old")
    expected = alone["generation"]["samples"]["greedy"]["The house"]["pruned"]
    asked.clear()
    beside = evaluated(capsys, small, *writing, "--speed")
    assert beside["generation"]["samples"]["greedy"]["The house"]["dense"] == expected
    assert beside["speed"]["against"]["model"] == NAME
    code, out, error = run(capsys, "generate", small, "--prompt", "The house", "--max-tokens", "6", "--json")
    assert (code, json.loads(out)["dense"]) == (0, expected), error
    code, out, error = run(capsys, "recover", small, *SHORT, "--data", "novels", "--out", tmp_path / "tuned", "--json")
    assert code == 0, error
    settings = json.loads((tmp_path / "tuned" / "saap" / "manifest.json").read_text())["recovery"]["settings"]
    assert (settings["teacher"], settings["dense_revision"]) == (NAME, "old")
    assert asked == []


def test_the_dense_model_is_not_downloaded_unasked(
    capsys: pytest.CaptureFixture[str], small: Path, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The house\n")
    found = evaluated(capsys, small, "--prompts", prompts, "--tokens", "6", "--speed")
    assert (found["generation"]["dense_figures"], found["speed"]["against"]) == (None, None)
    assert f"the dense model is not measured: There is no folder {NAME}" in found["notes"]
    code, _, error = run(capsys, "generate", small, "--prompt", "The house")
    assert (code, "--dense MODEL or --no-dense" in error) == (2, True)
    assert asked == []
    code, _, error = run(capsys, "eval", small, "--speed", "--dense", NAME)
    assert (code, NAME in error, len(asked)) == (2, True, 1)


@pytest.fixture
def own_code(made: Path, asked: list[Any], tmp_path: Path) -> tuple[Path, Path]:
    """A model that ships code of its own, and the file that this code leaves behind."""
    folder, mark = Path(shutil.copytree(made / f"models--{NAME.replace('/', '--')}" / "snapshots" / ("a" * 40),
                                        tmp_path / "own")), tmp_path / "ran"  # fmt: skip
    file = folder / "config.json"
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "of_its_own", "auto_map": names}))
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    return folder, mark


def test_code_is_run_of_the_model_alone_that_it_was_allowed_for(
    capsys: pytest.CaptureFixture[str], small: Path, own_code: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, mark = own_code
    tuned = ["--out", tmp_path / "tuned", "--data", "novels", *SHORT]
    for arguments in (
        ["eval", small, *TEXT, "--dense", folder],
        ["eval", small, "--speed", "--dense", folder],
        ["recover", small, *tuned, "--teacher", folder],
    ):
        code, _, error = run(capsys, *arguments, "--trust-remote-code")
        assert (code, "own.py" in error, mark.exists()) == (2, True, False), error
        assert "--dense-trust-remote-code" in error
    code, _, error = run(capsys, "eval", folder, *TEXT, "--dense", small, "--dense-trust-remote-code")
    assert (code, mark.exists()) == (2, False), error
    beside = evaluated(capsys, small, *TEXT, "--dense", folder, "--dense-trust-remote-code")
    assert (mark.exists(), beside["dense"]["parameters"] > beside["parameters"]) == (True, True)


def test_a_model_with_code_of_its_own_is_recovered_with_that_code(
    capsys: pytest.CaptureFixture[str], own_code: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, out = own_code[0], tmp_path / "tuned"
    code, _, error = run(capsys, "recover", folder, "--out", out, "--data", "novels", *SHORT, "--trust-remote-code")
    assert (code, (out / "own.py").is_file()) == (0, True), error
    evaluated(capsys, out, *TEXT, "--trust-remote-code")


def test_and_pruned_with_it(capsys: pytest.CaptureFixture[str], own_code: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = own_code[0], tmp_path / "small"
    ratio = ["--pruning-ratio", "0.2", "--layout", "uniform", "--align", "16", "--calibration", "novels", *FAST]
    code, _, error = run(capsys, "prune", folder, *ratio, "--out", out, "--trust-remote-code")
    assert (code, (out / "own.py").is_file()) == (0, True), error
    evaluated(capsys, out, *TEXT, "--trust-remote-code")


def test_what_is_said_of_one_model_does_not_hold_for_the_one_that_a_manifest_names(
    capsys: pytest.CaptureFixture[str], small: Path, own_code: tuple[Path, Path], tmp_path: Path
) -> None:
    foreign, (folder, mark) = Path(shutil.copytree(small, tmp_path / "foreign")), own_code
    file = foreign / "saap" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["base"] |= {"source": str(folder), "revision": None}
    file.write_text(json.dumps(manifest))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The house\n")
    writing = ["--prompts", prompts, "--tokens", "2", "--speed"]
    found = evaluated(capsys, foreign, *writing, "--dense", NAME, "--dense-trust-remote-code")
    assert (found["speed"]["against"]["model"], mark.exists()) == (NAME, False)
    found = evaluated(capsys, foreign, *writing, "--dense", folder, "--dense-trust-remote-code")
    assert (found["speed"]["against"]["model"], mark.exists()) == (str(folder), True)


def test_two_revisions_of_one_model_are_two_models(
    capsys: pytest.CaptureFixture[str], asked: list[Any], small: Path, tmp_path: Path
) -> None:
    report, page = tmp_path / "eval.json", tmp_path / "page.html"
    settings = ["--dense", NAME, "--dense-revision", "old", "--speed"]
    found = evaluated(capsys, NAME, *TEXT, *settings, "--out", report)
    assert (found["speed"]["model"]["model"], found["speed"]["against"]["model"]) == (NAME, f"{NAME}@old")
    code, _, error = run(capsys, "report", small, "--eval", report, "--out", page)
    assert code == 0, error
    for name, part in (("dense", found), ("dense@old", found["dense"])):
        assert f"<td>{name}</td><td>{value(part):,.2f}</td>" in re.sub(
            r"\s*<(/?)t([dh])[^>]*>\s*", r"<\1td>", page.read_text()
        )


@pytest.fixture
def old_alone(made: Path, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `some/dense` only the revision `old` is on this machine."""
    cache = Path(shutil.copytree(made, tmp_path / "hub"))
    (cache / f"models--{NAME.replace('/', '--')}" / "refs" / "main").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


def carried_out(capsys: pytest.CaptureFixture[str], recipe: Path) -> None:
    code, _, error = run(capsys, "run", recipe, "--quiet")
    assert code == 0, error


def test_a_recipe_for_a_pruned_model_keeps_to_the_revision_of_its_manifest(
    capsys: pytest.CaptureFixture[str], small: Path, old_alone: None, tmp_path: Path
) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    text = f"texts: [bundled], window: 32, max_tokens: 65, dense: {NAME}"
    tuning = f"{{data: [novels], length: 32, max_steps: 1, validation_samples: 1, group_size: 16, teacher: {NAME}}}"
    file.write_text(f"model: {small}\nout: {out}\nrecover: {tuning}\neval:\n  own: {{{text}}}\n")
    carried_out(capsys, file)
    found = json.loads((out / "eval" / "own.json").read_text())
    assert found["dense"]["revision"] == "old"
    speed = "speed: {new_tokens: 1}, dense: nobody/nothing"
    file.write_text(f"model: {small}\nout: {tmp_path / 'other'}\neval:\n  own: {{{speed}}}\n")
    code, _, error = run(capsys, "run", file, "--quiet")
    assert (code, "nobody/nothing" in error, (tmp_path / "other" / "eval").exists()) == (2, True, False), error


def test_a_recipe_opens_its_own_model_as_the_dense_one(
    capsys: pytest.CaptureFixture[str], asked: list[Any], tmp_path: Path
) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    step = "{texts: [bundled], window: 32, max_tokens: 65, dense: '${model}'%s}"
    lines = [f"model: {NAME}", "revision: old", f"out: {out}", "eval:", f"  own: {step % ''}"]
    file.write_text("\n".join([*lines, f"  other: {step % ', dense_revision: main'}"]))
    carried_out(capsys, file)
    own, other = (json.loads((out / "eval" / f"{name}.json").read_text()) for name in ("own", "other"))
    assert value(own["dense"]) == value(own) == value(other)
    assert value(other["dense"]) != value(other)


@pytest.mark.parametrize("content", ["{", '{"base": 3}', '{"base": {"source": "x"}}', "[]"])
def test_a_damaged_manifest_is_refused_by_everything_that_needs_it(
    capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path, content: str
) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "damaged"))
    (folder / "saap" / "manifest.json").write_text(content)
    for arguments in (
        ["eval", folder, "--speed"],
        ["generate", folder, "--prompt", "a"],
        ["recover", folder, *SHORT, "--data", "novels", "--out", tmp_path / "tuned"],
        ["export", folder, "--out", tmp_path / "x.gguf", "--no-verify"],
        ["report", folder],
    ):
        code, _, error = run(capsys, *arguments)
        assert code == 2, (arguments[0], error)
        assert "manifest.json is not a manifest of this version" in error.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]
    assert evaluated(capsys, folder, *TEXT)["perplexity"]  # needs the weights alone
