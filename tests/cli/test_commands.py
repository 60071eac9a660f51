"""The commands as a user types them, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.pipeline import tiny
from tests.processes import saap

FAST = ["--effort", "fast", "--num-samples", "4", "--sample-length", "32", "--refit-tokens", "1024", "--align", "8"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense"))


def test_help_names_every_flag() -> None:
    shown = saap("prune", "--help").stdout
    for flag in (
        "--output-dir", "--overwrite", "--work-dir", "--keep-work", "--pruning-ratio", "--target-params",
        "--target-size",
        "--target-speedup", "--runtime", "--gguf-type",
        "--calibration", "--num-samples", "--sample-length", "--refit-tokens", "--layout", "--roles", "--skip-layers",
        "--align", "--strategy", "--importance", "--fusion-scope", "--no-restore", "--preset", "--seed", "--device",
        "--dtype", "--revision", "--trust-remote-code", "--dry-run", "--json", "--quiet", "--plan",
    ):  # fmt: skip
        assert flag in shown


def test_prune_prints_what_the_user_needs(source: Path, tmp_path: Path) -> None:
    """In an interpreter of its own; the others are forked from one that has the imports."""
    command = [sys.executable, "-m", "saap", "prune", source, "--pruning-ratio", "0.2", "--out", tmp_path / "small"]
    done = subprocess.run([*command, *FAST], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for text in ("parameters", "bytes (float32)", "perplexity", "kept units per layer", "prompt:", "saap.load("):
        assert text in done.stdout
    assert (tmp_path / "small" / "model.safetensors").exists()


def test_json_is_one_object_on_stdout(source: Path, tmp_path: Path) -> None:
    done = saap("prune", source, "--pruning-ratio", "0.2", "--out", tmp_path / "small", "--json", *FAST)
    report = json.loads(done.stdout)
    assert report["pruning_ratio"] >= 0.2
    assert report["perplexity_ratio"] > 0
    assert "estimate" in done.stderr
    assert {stage["name"] for stage in report["stages"]} >= {"discover the coupled structures"}


def test_quiet_says_nothing(source: Path, tmp_path: Path) -> None:
    done = saap("prune", source, "--pruning-ratio", "0.2", "--out", tmp_path / "small", "--quiet", *FAST)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    done = saap("prune", source, "--pruning-ratio", "0.2", "--out", tmp_path / "small", "--dry-run", "--json", *FAST)
    assert json.loads(done.stdout)["targets"][0]["removal"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_the_preset_of_the_paper_would_tune_on(source: Path, tmp_path: Path) -> None:
    flags = ("--pruning-ratio", "0.2", "--preset", "paper", "--num-samples", "4", "--sample-length", "16", "--dry-run")
    done = saap("prune", source, "--out", tmp_path / "small", *flags)
    assert done.returncode == 0, done.stderr
    assert "tuned on conversations" in " ".join(done.stdout.split())


def test_inspect(source: Path) -> None:
    shown = json.loads(saap("inspect", source, "--json").stdout)
    roles = {row["role"]: row for row in shown["roles"]}
    assert (roles["ffn"]["groups"], roles["ffn"]["units"], roles["ffn"]["parameters_per_unit"]) == (4, 96, 3 * 32)
    assert (roles["attention"]["units"], roles["hidden"]["units"]) == (2, 32)
    table = saap("inspect", source).stdout
    assert "gate_proj" in table
    assert "attention" in table


def test_a_refusal_is_one_line_and_no_traceback(source: Path, tmp_path: Path) -> None:
    done = saap("prune", source, "--pruning-ratio", "2", "--out", tmp_path / "small")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_recipe_runs_dry(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\nout: {tmp_path / 'out'}\nprune: {{pruning_ratios: [0.2]}}\nrecover: {{}}\n")
    done = saap("run", recipe, "--dry-run", "--json", "--set", "prune.align=8", "--set", "recover=null")
    assert done.returncode == 0, done.stderr
    (step,) = json.loads(done.stdout)["steps"]
    assert step["parameters"] < json.loads(done.stdout)["parameters"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]
