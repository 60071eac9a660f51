"""Models with few positions: whatever reads more of them at once is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.command import run
from tests.pipeline import tiny
from transformers import GPT2Config, GPT2LMHeadModel

POSITIONS = 48
COMPARE = [
    "--methods", "magnitude", "--pruning-ratios", "0.2", "--sample-length", "32", "--align", "8", "--effort", "fast",
]  # fmt: skip
GROUPS = ["--group-size", "16"]
TRAIN = ["--data", "novels", "--max-steps", "1", "--validation-samples", "1", "--rank", "2"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("few")
    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(at)
    tiny.tokenizer().save_pretrained(at)
    return at


@pytest.mark.parametrize(
    ("command", "arguments", "remedy"),
    [
        ("compare", COMPARE, "Use shorter samples or windows"),
        ("recover", [*TRAIN, *GROUPS], "Use a smaller --max-seq-length"),
        ("recover", [*TRAIN, "--tuning", "lora"], "Use a smaller --max-seq-length"),
        ("eval", ["--generation", "--max-new-tokens", "64"], "Use fewer --max-new-tokens or shorter prompts"),
        ("eval", ["--speed"], "Measure speed with fewer tokens, or leave it out"),
        ("generate", ["--prompt", "The house", "--max-new-tokens", "64", "--no-dense"], "Use fewer --max-new-tokens"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, arguments: list[str], remedy: str
) -> None:
    out = ["--out", tmp_path / "out"] if command in ("compare", "recover") else []
    code, _, error = run(capsys, command, few, *arguments, *out)
    last = error.splitlines()[-1]
    assert (code, list(tmp_path.iterdir())) == (2, []), error
    assert last.startswith("error: GPT2LMHeadModel cannot process ")
    assert "tokens at once (IndexError: index out of range in self). " + remedy in last


def test_what_fits_runs(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The house\n")
    code, _, error = run(capsys, "recover", few, *TRAIN, *GROUPS, "--length", POSITIONS, "--out", tmp_path / "tuned")
    assert code == 0, error
    code, _, error = run(capsys, "eval", tmp_path / "tuned", "--prompts", prompts, "--max-new-tokens", "8")
    assert code == 0, error
    code, _, error = run(capsys, "generate", few, "--prompt", "The house", "--max-new-tokens", "32", "--no-dense")
    assert code == 0, error
