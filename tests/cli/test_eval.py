"""`saap eval` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.command import run
from tests.data.byte_tokenizer import byte_tokenizer
from tests.pipeline import tiny

from saap.core.errors import OutputError

LED = byte_tokenizer(bos=True)


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


def test_the_terminal_names_measures_as_the_page_does(capsys, tmp_path, source) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("The house\n")
    code, out, _ = run(capsys, "eval", source, "--prompts", prompts, "--max-new-tokens", "8")
    assert code == 0
    assert all(label in out for label in ("distinct words, %", "repeated, %", "repeated by quarter, %"))
    assert "100.00" in next(line for line in out.splitlines() if "distinct triples, %" in line)


def test_a_text_shorter_than_a_window_and_a_model_without_tokenizer(capsys, tmp_path, source) -> None:
    text = tmp_path / "short.txt"
    text.write_text("few words")
    code, _, error = run(capsys, "eval", source, "--perplexity", text)
    assert (code, "fewer than one window of 512" in error) == (2, True)
    bare = tmp_path / "bare"
    tiny.model().save_pretrained(bare)
    code, _, error = run(capsys, "eval", bare, "--perplexity", "bundled", "--quiet")
    assert (code, "no tokenizer" in error) == (2, True)


def test_conversations_and_places_are_checked_before_the_weights_are_read(
    capsys, monkeypatch, tmp_path, source
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("saap.pipeline.evaluate.run.open_model", opened)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    answered, unanswered = tmp_path / "answered.jsonl", tmp_path / "unanswered.jsonl"
    answered.write_text(json.dumps({"messages": turns}) + "\n")
    unanswered.write_text(json.dumps({"messages": turns[:1]}) + "\n")
    text = ["--perplexity", "bundled", "--window", "64"]
    for arguments, offender in (
        (["--chat", answered], "no chat template"),
        (["--chat", unanswered], "no turn of an assistant"),
        (["-o", tmp_path], "is a folder"),
        (["-o", answered / "report.json"], "cannot be written"),
    ):
        code, _, error = run(capsys, "eval", source, *text, *arguments)
        assert (code, offender in error) == (2, True), error


def test_results_are_shown_even_if_the_report_cannot_be_written(capsys, monkeypatch, tmp_path, source) -> None:
    def full(*_: object) -> None:
        raise OutputError("the disk is full", "Free some space")

    monkeypatch.setattr("saap.pipeline.evaluate.run.write_report", full)
    text = ["--perplexity", "bundled", "--window", "64", "--max-tokens", "64"]
    code, out, error = run(capsys, "eval", source, *text, "-o", tmp_path / "report.json", "--json")
    assert (code, "the disk is full" in error) == (2, True)
    assert json.loads(out)["perplexity"]["bundled"]["tokens"] == 63


def test_a_dense_model_with_another_tokenizer_reads_its_own_tokens(capsys, tmp_path, source) -> None:
    other = tmp_path / "other"
    tiny.model(vocab_size=len(LED)).save_pretrained(other)
    LED.save_pretrained(other)
    text = ["--perplexity", "bundled", "--window", "64", "--max-tokens", "256", "--json"]
    _, out, _ = run(capsys, "eval", other, *text)
    alone = json.loads(out)["perplexity"]["bundled"]
    code, out, error = run(capsys, "eval", source, *text, "--dense", other)
    assert (code, json.loads(out)["dense"]["perplexity"]["bundled"]) == (0, alone), error
    code, _, error = run(capsys, "eval", source, "--generation", "--max-new-tokens", "4", "--dense", other)
    assert (code, "another vocabulary" in error) == (2, True), error


def test_a_stride_of_one_window_is_no_stride(capsys, tmp_path) -> None:
    led = tmp_path / "led"
    tiny.model(vocab_size=len(LED)).save_pretrained(led)
    LED.save_pretrained(led)
    text = ["--perplexity", "bundled", "--window", "64", "--max-tokens", "256", "--json"]
    _, plain, _ = run(capsys, "eval", led, *text)
    code, strided, error = run(capsys, "eval", led, *text, "--stride", "64")
    assert code == 0, error
    assert json.loads(strided)["perplexity"] == json.loads(plain)["perplexity"]
