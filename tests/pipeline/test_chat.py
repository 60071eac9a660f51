"""`saap chat`: the same questions to two models, in the terminal and in a browser."""

from __future__ import annotations

import importlib.util
import io
import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests import command
from tests.browser import CHROMIUM
from tests.data.byte_tokenizer import CHAT_TEMPLATE
from tests.export.gguf_models import adaptive_folder, family_folder, family_model
from tests.pipeline import tiny

from saap.cli.show.answers import print_in_turn
from saap.core.errors import UnsupportedModelError
from saap.evaluation.generation import message_ids
from saap.pipeline.evaluate import chat
from saap.pipeline.evaluate.chat import Reply, Turns, replies, with_answers, with_question
from saap.pipeline.evaluate.generate import Speaker, continued
from saap.settings.evaluate import GenerationSettings

SHORT = GenerationSettings(max_tokens=4)
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]


def speaker(label: str, layers: int = 2, template: str | None = None) -> Speaker:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return Speaker(label, tiny.model(layers), tokenizer)


def test_a_conversation_is_continued_in_the_chat_template_or_as_lines() -> None:
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    plain, chatting = speaker("a").tokenizer, speaker("a", template=CHAT_TEMPLATE).tokenizer
    assert plain.decode(message_ids(plain, turns)) == "One?\nTwo.\nThree?"
    assert plain.decode(message_ids(chatting, turns)) == (
        "<|system|>Be brief.\n<|user|>One?\n<|assistant|>Two.\n<|user|>Three?\n"
    )
    assert message_ids(chatting, turns, chat=False) == message_ids(plain, turns)


def test_the_models_answer_in_turn_each_in_its_own_conversation() -> None:
    speakers = speaker("dense"), speaker("pruned", 3)
    turns = with_question({"dense": [], "pruned": []}, "Once")
    rounds = list(replies(speakers, turns, SHORT))
    assert [one["pruned"].tokens for one in rounds if one["dense"].tokens < rounds[-1]["dense"].tokens] == [0] * 4
    first = with_answers(turns, rounds[-1])
    for one in speakers:
        alone = list(continued(one, message_ids(one.tokenizer, turns[one.label]), SHORT))
        assert first[one.label][1] == {"role": "assistant", "content": alone[-1].rstrip("\ufffd")}
        assert rounds[-1][one.label].tokens == len(alone) > 1
        assert (rounds[-1][one.label].tokens_per_second or 0) > 0
    *_, last = replies(speakers, with_question(first, "Twice"), SHORT)
    alone = list(
        continued(speakers[0], message_ids(speakers[0].tokenizer, with_question(first, "Twice")["dense"]), SHORT)
    )
    assert last["dense"].text == alone[-1].rstrip("\ufffd")


def test_an_answer_that_ends_at_once_has_its_heading(capsys: pytest.CaptureFixture[str]) -> None:
    nothing, words = Reply(), [Reply(text="Hi", tokens=1), Reply(text="Hi there", tokens=2, tokens_per_second=2.0)]
    headings = {label: label for label in ("dense", "pruned", "tuned")}
    print_in_turn([{"dense": nothing, "pruned": one, "tuned": nothing} for one in (nothing, *words)], headings)
    shown = ["dense: ", "  [0 tokens]", "pruned: Hi there", "  [2 tokens, 2.0 tokens/s]", "tuned: ", "  [0 tokens]"]
    assert capsys.readouterr().out.splitlines() == shown


def test_a_conversation_that_is_too_long_is_refused() -> None:
    long = with_question({"dense": []}, "word " * 2000)
    with pytest.raises(UnsupportedModelError):
        list(replies((Speaker("dense", family_model("gpt2"), tiny.tokenizer()),), long, SHORT))


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`saap chat` with lines of the standard input."""

    def chatting(source: Path, *arguments: str, typed: io.StringIO | str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed) if isinstance(typed, str) else typed)
        return command.run(capsys, "chat", source, "--device", "cpu", *arguments)

    return chatting


def test_questions_come_from_the_standard_input(tmp_path: Path, run: Run) -> None:
    source = family_folder(tmp_path / "model", "llama")
    short = ("--dense", str(source), "--max-new-tokens", "4")
    code, text, _ = run(source, *short, typed="Once\n\nTwice\n/reset\nOnce\n")
    assert code == 0
    blocks = [part for part in text.split("]\n") if part]
    assert [part.split(",")[0] for part in blocks] == ["dense", "pruned"] * 3
    answers = [part.split("MB: ", 1)[1].rsplit("\n  [", 1)[0] for part in blocks]
    assert answers[0] == answers[1] == answers[4]  # after /reset as at first
    assert answers[2] != answers[0]
    assert all("tokens/s" in part for part in blocks)


def test_without_its_dense_model_it_chats_alone(tmp_path: Path, run: Run) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={0: (1, 2)}, attention={})
    code, text, note = run(folder, "--max-new-tokens", "4", typed="Once\n")  # its manifest names a model not here
    assert (code, text.startswith("answer, "), "--dense MODEL" in note) == (0, True, True)
    code, _, note = run(folder, "--dense", str(tmp_path / "nowhere"))
    assert (code, "nowhere" in note) == (2, True)
    record = folder / "saap" / "manifest.json"
    fields = json.loads(record.read_text())
    fields["base"]["source"] = str(family_folder(tmp_path / "whole", "llama"))
    record.write_text(json.dumps(fields))
    code, text, note = run(folder, "--max-new-tokens", "4", typed="Once\n")
    assert (code, text.startswith("dense, "), "pruned, " in text, "note:" in note) == (0, True, True, False)


class Terminal(io.StringIO):
    """Lines that someone types."""

    def isatty(self) -> bool:
        return True


def test_an_interrupt_ends_one_answer_and_not_the_chat(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = family_folder(tmp_path / "model", "llama")
    asked: list[Turns] = []

    def interrupted(speakers: tuple[Speaker, ...], turns: Turns, settings: object) -> Iterator[dict[str, Reply]]:
        asked.append(turns)
        if len(asked) == 3:
            raise KeyboardInterrupt  # before anything is written
        yield {"answer": Reply(text=f"answer {len(asked)}", tokens=2)}
        if len(asked) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "replies", interrupted)
    code, _, error = run(source, typed=Terminal("One\nTwo\nThree\nFour\n"))
    assert (code, error.count("interrupted")) == (0, 2)
    assert [message["content"] for message in asked[-1]["answer"]] == ["One", "answer 1", "Two", "answer 2", "Four"]
    asked.clear()
    code, _, error = run(source, typed="One\nTwo\n")
    assert (code, len(asked)) == (130, 1)
    assert error.splitlines()[-1] == "interrupted."


def test_what_cannot_be_served_is_refused_before_a_model_is_opened(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Path("nowhere")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else found(name))
    code, _, error = run(nowhere, "--web")
    assert (code, "pip install 'saap[chat]'" in error) == (2, True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "gradio" else found(name))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        code, _, error = run(nowhere, "--web", "--port", str(other.getsockname()[1]))
    assert (code, "Give another one with --port" in error) == (2, True)
    code, _, error = run(nowhere, "--port", "8000")
    assert (code, "Add --web" in error) == (2, True)
    code, _, error = run(nowhere, "--dense", "a", "--no-dense")
    assert (code, "Give one of the two" in error) == (2, True)


@pytest.mark.skipif("gradio" in MISSING, reason="not installed: gradio")
def test_an_answer_is_plain_text_and_a_new_conversation_ends_it() -> None:
    from saap.cli.show.chat_page import chat_page

    page = chat_page((speaker("dense"), speaker("pruned", 3)), SHORT).get_config_file()
    boxes = [one["props"]["render_markdown"] for one in page["components"] if one["type"] == "chatbot"]
    assert boxes == [False, False]
    asked, reset, *others = page["dependencies"]
    ended = [one["targets"] for one in (reset, *others) if one["cancels"] == [asked["id"]]]
    assert ended == [reset["targets"]]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_the_page_in_a_browser() -> None:
    from playwright.sync_api import expect, sync_playwright

    from saap.cli.show.chat_page import chat_page

    speakers = speaker("dense"), speaker("pruned", 3)
    page = chat_page(speakers, SHORT).queue()
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            window = browser.new_page()
            window.goto(address)
            for number, question in enumerate(("Once", "Twice"), 1):
                window.get_by_label("Question").fill(question)
                while window.get_by_label("Question").input_value():  # it stays while the models still answer
                    window.keyboard.press("Enter")
                    window.wait_for_timeout(500)
                expect(window.locator(".bot.message")).to_have_count(2 * number, timeout=60_000)
                expect(window.get_by_text("tokens/s")).to_have_count(2, timeout=60_000)
            *_, found = replies(speakers, with_question({"dense": [], "pruned": []}, "Once"), SHORT)
            shown = window.locator(".bot.message").all_inner_texts()
            assert " ".join(found["dense"].text.split()) in " ".join(shown[0].split())
            window.get_by_role("button", name="New conversation").click()
            expect(window.locator(".bot.message")).to_have_count(0, timeout=60_000)
            browser.close()
    finally:
        page.close()
