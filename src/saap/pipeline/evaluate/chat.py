"""A conversation with several models: the same questions, each with its own answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from saap.core.errors import ConfigurationError
from saap.evaluation.generation import message_ids
from saap.pipeline.evaluate.generate import Speaker, continued
from saap.settings.evaluate import GenerationSettings

Turns = Mapping[str, list[dict[str, str]]]
"""The conversation of each model by its label: messages with `role` and `content`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer so far. tokens_per_second: of decoding, None before the second token."""

    text: str = ""
    tokens: int = 0
    tokens_per_second: float | None = None


def with_question(turns: Turns, question: str) -> Turns:
    """The conversations with one more question."""
    return {label: [*past, {"role": "user", "content": question}] for label, past in turns.items()}


def with_answers(turns: Turns, replies: Mapping[str, Reply]) -> Turns:
    """The conversations with the answers to their last question."""
    return {label: [*past, {"role": "assistant", "content": replies[label].text}] for label, past in turns.items()}


def replies(speakers: tuple[Speaker, ...], turns: Turns, settings: GenerationSettings) -> Iterator[dict[str, Reply]]:
    """All answers to the last question by label, after each token.

    The models answer one after the other, so that none slows another. Raises UnsupportedModelError for a conversation
    that is too long for a model.
    """
    found = {speaker.label: Reply() for speaker in speakers}
    yield dict(found)
    for speaker in speakers:
        for reply in _reply(speaker, turns[speaker.label], settings):
            found[speaker.label] = reply
            yield dict(found)


def _reply(speaker: Speaker, messages: list[dict[str, str]], settings: GenerationSettings) -> Iterator[Reply]:
    ids = message_ids(speaker.tokenizer, messages, chat=settings.chat)
    if not ids:
        raise ConfigurationError("The question has no tokens", "Write a text that the model can continue")
    texts, tokens, spent = continued(speaker, ids, settings), 0, 0.0
    while True:
        started = time.perf_counter()  # only the model's own time counts, not that of showing the answer
        text = next(texts, None)
        if text is None:
            return
        if tokens:  # the first token also takes the time of the prompt
            spent += time.perf_counter() - started
        tokens += 1
        complete = text.rstrip("\N{REPLACEMENT CHARACTER}")  # an incomplete character is not shown yet
        yield Reply(text=complete, tokens=tokens, tokens_per_second=(tokens - 1) / spent if spent else None)
