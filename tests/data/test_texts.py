from __future__ import annotations

import builtins
import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer

from saap.core.errors import CalibrationError
from saap.data.texts import (
    DATA_SETS,
    GENERAL,
    KINDS,
    Purpose,
    bundled_text,
    check_source,
    evaluation_text,
    has_rows,
    kind_weights,
    names_a_source,
    read_documents,
)

BUNDLED = Path(bundled_text.__code__.co_filename).parent / "bundled"


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_bundled_kinds_and_their_mixture():
    assert [len(read_documents(kind)) for kind in KINDS] == [1] * len(KINDS)
    assert read_documents("mixed") == tuple(bundled_text(kind, Purpose.CALIBRATION) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_no_passage_serves_both_purposes(kind):
    calibration = {line for line in bundled_text(kind, Purpose.CALIBRATION).splitlines() if len(line) > 80}
    evaluation = {line for line in bundled_text(kind, Purpose.EVALUATION).splitlines() if len(line) > 80}
    assert len(calibration) >= 15
    assert len(evaluation) >= 3
    assert not calibration & evaluation


def test_conversations_come_plain_and_with_the_chat_template():
    plain = bundled_text("conversations", Purpose.CALIBRATION)
    both = bundled_text("conversations", Purpose.CALIBRATION, byte_tokenizer(chat_template=CHAT_TEMPLATE))
    assert "<|user|>" not in plain
    rows = bz2.decompress((BUNDLED / "conversations.jsonl.bz2").read_bytes()).decode().partition("\f")[2].count("\n")
    assert both.count("<|user|>") == both.count("<|assistant|>") == rows // 2 > 1000
    strict = byte_tokenizer(chat_template="{{ raise_exception('only with a system prompt') }}")
    for tokenizer in (byte_tokenizer(), strict):
        assert bundled_text("conversations", Purpose.CALIBRATION, tokenizer) == plain


def test_the_mixed_evaluation_text_has_each_kind():
    text = evaluation_text()
    for kind in GENERAL:
        assert bundled_text(kind, Purpose.EVALUATION)[:5000] in text


def test_a_kind_weighs_as_much_as_the_model_knows_it():
    known = dict.fromkeys(KINDS, 1.2)
    whole = kind_weights(known)
    assert {kind: whole[kind] / whole["novels"] for kind in KINDS} == {
        kind: KINDS[kind] / KINDS["novels"] for kind in KINDS
    }
    some = kind_weights({**known, "french": 1.6, "code": 0.4, "chinese": 2.4})
    assert (some["french"], some["code"]) == (whole["french"] / 2, 4 * whole["code"])
    assert some["chinese"] == 0
    assert kind_weights(dict.fromkeys(KINDS, 8.0)) == KINDS


def test_the_bundled_text_stays_small():
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) < 1_500_000


def test_a_text_file_is_one_document_compressed_or_not(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n", encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"One.\n\nTwo.\n"))
    assert read_documents(tmp_path / "a.txt") == ("One.\n\nTwo.\n",)
    assert read_documents(str(tmp_path / "a.txt.gz")) == ("One.\n\nTwo.\n",)


def test_rows_are_documents_empty_ones_too(tmp_path):
    # Empty rows count: the usual WikiText-2 string joins them with the others.
    path = jsonl(tmp_path / "rows.jsonl", {"text": "a b"}, "\n", {"text": ""}, {"text": "line\u2028separator"})
    assert read_documents(path) == ("a b", "", "line\u2028separator")


def test_conversations_go_through_the_chat_template(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = jsonl(tmp_path / "chat.jsonl", {"messages": turns}, {"messages": turns})
    written = "<|system|>Be brief.\n<|user|>Hi\n<|assistant|>Hello\n"
    assert read_documents(path, tokenizer=byte_tokenizer(chat_template=CHAT_TEMPLATE)) == (written * 2,)


@pytest.mark.parametrize("tokenizer", [None, byte_tokenizer()])
def test_conversations_without_a_template_are_refused(tmp_path, tokenizer):
    path = jsonl(tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": "Hi"}]})
    with pytest.raises(CalibrationError, match=r"chat\.jsonl, line 1, .* no chat template"):
        read_documents(path, tokenizer=tokenizer)


def test_a_conversation_that_the_template_cannot_write_is_named(tmp_path):
    path = jsonl(tmp_path / "chat.jsonl", {"messages": []})
    with pytest.raises(CalibrationError, match=r"chat\.jsonl, line 1, does not fit the chat template"):
        read_documents(path, tokenizer=byte_tokenizer(chat_template=CHAT_TEMPLATE))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"text": "cut off\n', "is not JSON"),
        ("[1, 2]\n", "is not a JSON object"),
        ('{"content": "x"}\n', "has neither a string `text` nor a list `messages`"),
        ('{"text": 3}\n', "has neither a string `text` nor a list `messages`"),
    ],
)
def test_a_malformed_line_is_named_with_its_file(tmp_path, row, problem):
    path = jsonl(tmp_path / "rows.jsonl", {"text": "fine"}, "\n", row)
    with pytest.raises(CalibrationError, match=rf"rows\.jsonl, line 3, {problem}"):
        read_documents(path)


@pytest.mark.parametrize(("name", "content"), [("e.txt", b""), ("e.txt", b" \n\t\n"), ("e.jsonl", b'{"text": ""}\n')])
def test_an_empty_text_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=rf"{name} has no text"):
        read_documents(tmp_path / name)


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:20])
    (tmp_path / "table.csv").write_text("a,b", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"latin\.txt is not UTF-8 at byte 3"):
        read_documents(tmp_path / "latin.txt")
    with pytest.raises(CalibrationError, match=r"cut\.txt\.gz cannot be read"):
        read_documents(tmp_path / "cut.txt.gz")
    with pytest.raises(CalibrationError, match=r"table\.csv is not a supported kind of text file"):
        read_documents(tmp_path / "table.csv")
    with pytest.raises(CalibrationError, match="is a folder"):
        read_documents(tmp_path)


def test_an_unknown_name_gets_near_names_and_all_names(tmp_path):
    with pytest.raises(CalibrationError, match=r"novel is neither .* Did you mean novels\?.*encyclopaedia.*wikitext2"):
        read_documents("novel")
    (tmp_path / "corpus.txt").write_text("text", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"Did you mean .*corpus\.txt"):
        read_documents(tmp_path / "corpsu.txt")


def test_a_data_set_without_the_package_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without_datasets(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(CalibrationError, match=r"wikitext2 .* not installed.*saap\[eval\]"):
        read_documents("wikitext2")


class FakeDataSets:
    """Stands in for the package: records the call, gives rows or fails."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load_dataset(self, *arguments: Any, **options: Any) -> Any:
        self.calls.append((arguments, options))
        if self.failure is not None:
            raise self.failure
        return ({"text": f"row {index}"} for index in range(5000))


def test_a_data_set_that_cannot_be_reached_is_refused(monkeypatch):
    fake = FakeDataSets(failure=ConnectionError("Couldn't reach the hub\nmore"))
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
    with pytest.raises(CalibrationError, match=r"c4 cannot be fetched \(Couldn't reach the hub\)\. Connect"):
        read_documents("c4")


def test_each_purpose_reads_its_own_split_and_no_more_rows_than_needed(monkeypatch):
    fake = FakeDataSets()
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
    assert read_documents("wikitext2")[0] == "row 0"
    assert len(read_documents("c4", purpose=Purpose.EVALUATION)) == DATA_SETS["c4"].rows
    assert [options["split"] for _, options in fake.calls] == ["train", "validation"]


def test_names_files_and_texts_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("two words").write_text("text", encoding="utf-8")
    for name in ("mixed", "wikitext2", "typo", "missing file.txt", "two words"):
        assert names_a_source(name)
    for text in ("It was a dark night.", "One\ntwo.txt", "word " * 10_000):
        assert not names_a_source(text)


CHINESE = "\u6c49\u5b57" * 3000


def test_a_long_text_without_spaces_is_a_text_and_no_path():
    assert not names_a_source(CHINESE)
    assert names_a_source(CHINESE[:8])
    assert not has_rows(f"{CHINESE}.jsonl")
    with pytest.raises(CalibrationError, match=r"\.\.\. is neither a file nor a known text") as caught:
        read_documents(CHINESE)
    assert len(str(caught.value)) < 500
    with pytest.raises(CalibrationError, match="is neither a file nor a known text"):
        check_source(CHINESE)


def test_half_of_a_surrogate_pair_is_named_with_its_line(tmp_path):
    whole = '{"text": "\\ud83d\\ude00"}\n'
    path = jsonl(tmp_path / "rows.jsonl", whole, '{"text": "cut \\uD83D"}\n')
    with pytest.raises(CalibrationError, match=r"rows\.jsonl, line 2, has half of a surrogate pair"):
        read_documents(path)
    assert read_documents(jsonl(path, whole)) == ("\U0001f600",)
