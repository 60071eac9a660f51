"""`saap eval` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.command import run
from tests.pipeline import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense"))


def test_json_is_one_object_with_the_promised_fields(capsys, tmp_path, source) -> None:
    rows = [{"query": f"{n}?", "choices": ["yes", "no"], "label": n % 2} for n in range(4)]
    (tmp_path / "made.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "The house"}\n{"prompt": "The capital is", "answer": "a"}\n')
    code, out, _ = run(
        capsys, "eval", source, "--perplexity", "bundled", "--window", "64", "--stride", "32", "--max-tokens", "256",
        "--tasks", "made", "--task-data", tmp_path, "--prompts", prompts, "--max-new-tokens", "8", "--dense", source,
        "--json",
        "--out", tmp_path / "report.json",
    )  # fmt: skip
    shown = json.loads(out)
    assert code == 0
    assert shown == json.loads((tmp_path / "report.json").read_text())
    assert set(shown["tasks"]["made"]) >= {"acc", "acc_norm", "acc_stderr", "acc_norm_stderr"}
    assert shown["perplexity"]["bundled"]["tokens"] == 255
    assert shown["dense"]["perplexity"]["bundled"]["value"] == shown["perplexity"]["bundled"]["value"]
    assert shown["generation"]["token_agreement"] == 1.0
    assert shown["tasks_mean"]["acc"] == shown["tasks"]["made"]["acc"]
    code, out, _ = run(capsys, "eval", source, "--perplexity", "bundled", "--max-tokens", "600")
    assert "perplexity" in out


@pytest.mark.parametrize(
    ("arguments", "offender"),
    [
        ([], "nothing to measure"),
        (["--perplexity", "none.txt"], "none.txt"),
        (["--perplexity", "bundled", "--window", "1"], "--window 1"),
        (["--perplexity", "bundled", "--stride", "900"], "--stride 900"),
        (["--tasks", "arc_esay"], "Did you mean arc_easy"),
        (["--chat", "none.jsonl"], "none.jsonl"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--generation", "--dense", "no/where/at/all"], "no/where/at/all"),
    ],
)
def test_refusals(capsys, source, arguments, offender) -> None:
    code, _, error = run(capsys, "eval", source, *arguments)
    assert code == 2
    assert offender in error
    assert error.startswith("error: ")


def test_a_text_shorter_than_a_window_and_a_model_without_tokenizer(capsys, tmp_path, source) -> None:
    text = tmp_path / "short.txt"
    text.write_text("few words")
    code, _, error = run(capsys, "eval", source, "--perplexity", text)
    assert (code, "fewer than one window of 512" in error) == (2, True)
    bare = tmp_path / "bare"
    tiny.model().save_pretrained(bare)
    code, _, error = run(capsys, "eval", bare, "--perplexity", "bundled", "--quiet")
    assert (code, "no tokenizer" in error) == (2, True)
