"""Refusals that take more than a bad input (see test_bad_inputs.py): exit code 2, one sentence, nothing written."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tests.command import run
from tests.pipeline import tiny
from tests.processes import python

from saap.cli import app

FAST = ["--effort", "fast", "--num-samples", "4", "--sample-length", "32", "--refit-tokens", "1024", "--align", "8"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: object, offender: str) -> None:
    out = tmp_path / "out"
    code, _, error = run(capsys, *arguments[:2], *FAST, *arguments[2:], "--out", out)
    last = error.strip().splitlines()[-1]
    assert code == 2, error
    assert last.startswith("error: ")
    assert offender in last
    assert "Traceback" not in error
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_existing_output_is_kept(capsys, tmp_path, source) -> None:
    out = tmp_path / "there"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    code, _, error = run(capsys, "prune", source, "--pruning-ratio", "0.2", "--out", out)
    assert (code, "exists" in error) == (2, True)
    code, _, error = run(capsys, "prune", source, "--pruning-ratio", "0.2", "--out", out, "--overwrite")
    assert code == 2
    assert [file.read_text() for file in out.iterdir()] == ["mine"]
    (out / "mine.txt").rename(out / "config.json")
    (out / "config.json").write_text('{"port": 80}')  # the configuration of another program
    code, _, error = run(capsys, "prune", source, "--pruning-ratio", "0.2", "--out", out, "--overwrite")
    assert (code, "not a model" in error) == (2, True)
    link = tmp_path / "link"
    link.symlink_to(out)
    code, _, error = run(capsys, "prune", source, "--pruning-ratio", "0.2", "--out", link, "--overwrite")
    assert (code, "is a link" in error) == (2, True)


def test_a_chat_template_that_refuses_a_question_costs_only_the_answer(capsys, copy, tmp_path) -> None:
    (copy / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    few = ["--pruning-ratio", "0.1", "--calibration", "novels"]
    code, out, error = run(capsys, "prune", copy, *few, *FAST, "--out", tmp_path / "out", "--json")
    assert (code, json.loads(out)["prompt"]) == (0, ""), error


def test_a_hidden_size_that_no_group_divides_is_refused_before_the_pruning(capsys, tmp_path) -> None:
    source = tiny.folder(tmp_path / "narrow", hidden_size=40, num_attention_heads=5, num_key_value_heads=5)
    few = ["--pruning-ratio", "0.1", "--recover", "conversations", "--align", "32"]
    code, _, error = run(capsys, "prune", source, *few, "--out", tmp_path / "out")
    assert (code, "do not divide the hidden size 40" in error) == (2, True), error


def test_a_place_that_the_system_refuses_is_one_sentence(capsys, source, tmp_path) -> None:
    code, _, error = run(capsys, "prune", source, "--pruning-ratio", "0.2", "--out", tmp_path / ("a" * 300))
    assert (code, "File name too long" in error, "Traceback" in error) == (2, True, False)


def test_unsupported_architecture_names_what_stopped_it(capsys, tmp_path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tiny.tokenizer().save_pretrained(tmp_path / "mamba")
    refused(capsys, tmp_path, "prune", tmp_path / "mamba", "--pruning-ratio", "0.2", offender="error: ")


def test_non_finite_loss(capsys, tmp_path, copy) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused(capsys, tmp_path, "prune", copy, "--pruning-ratio", "0.2", offender="sample 0 is nan")


def test_tokenizer_of_another_vocabulary(capsys, tmp_path) -> None:
    small = tiny.folder(tmp_path / "small", vocab_size=60)
    refused(capsys, tmp_path, "prune", small, "--pruning-ratio", "0.2", offender="60")


def test_full_disk(capsys, tmp_path, source, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    refused(capsys, tmp_path, "prune", source, "--pruning-ratio", "0.2", offender="MB free")


def test_stale_stage_files(capsys, tmp_path, source) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "settings.json").write_text('{"digest": "0123456789abcdef"}')
    arguments = ["prune", source, "--pruning-ratio", "0.2", "--work-dir", work]
    refused(capsys, tmp_path, *arguments, offender="0123456789ab")


OTHER_VERSION = """
import sys
from saap.cli import app
for name, module in list(sys.modules.items()):
    if name.startswith("saap") and "__version__" in vars(module):
        module.__version__ = "99.0"
app.main()
"""


@pytest.mark.parametrize("command", ["prune", "recover"])
def test_stage_files_of_another_version_are_not_taken_up(capsys, tmp_path, source, command) -> None:
    short = {
        "prune": ["--pruning-ratio", "0.2", *FAST, "--calibration", "novels"],
        "recover": ["--data", "novels", "--max-seq-length", "32", "--max-steps", "1", "--validation-samples", "1"],
    }  # fmt: skip
    arguments = [command, source, *short[command], "--keep-work", "--overwrite", "--out", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 0
    done = python(OTHER_VERSION, *arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'out.saap-work'} has stages of a run with other settings or texts, ")
    assert "another version of saap" in last


@pytest.mark.parametrize("command", [("prune", "--pruning-ratio", "0.2", *FAST), ("recover", "--group-size", "16")])
def test_two_runs_do_not_share_a_work_folder(capsys, tmp_path, source, command) -> None:
    name, *flags = command
    out, work = tmp_path / "out", tmp_path / "out.saap-work"
    work.mkdir()
    with FileLock(work / "lock"):
        code, _, error = run(capsys, name, source, *flags, "--out", out)
    assert code == 2
    assert f"Another run is at work in {work}" in error.strip().splitlines()[-1]
    assert not out.exists()


def test_a_lock_goes_with_its_run(capsys, tmp_path, source) -> None:
    arguments = ["prune", source, "--pruning-ratio", "0.2", *FAST, "--keep-work", "--out", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 0
    assert run(capsys, *arguments, "--overwrite")[0] == 0


@pytest.mark.parametrize("command", ["prune", "recover", "compare", "run", "eval", "export", "chat", "demo"])
def test_an_interrupt_promises_to_resume_only_what_resumes(capsys, monkeypatch, command) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "app", interrupted)
    code, _, error = run(capsys, command, "somewhere")
    assert (code, error.startswith("interrupted")) == (130, True)
    assert ("resumes" in error) is (command in ("prune", "recover", "compare", "run"))
