"""Perplexity of the answers in conversations, rendered with the model's chat template."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from saap.core.errors import EvaluationError
from saap.core.evaluation_records import ChatPerplexity
from saap.data.texts import answer_turns
from saap.evaluation.generation import continuation
from saap.models.walk.probe import read_at_once

MAX_TOKENS = 1024
"""Of context and answer."""
Conversations = Mapping[str, Sequence[dict[str, Any]]]


def check_conversations(tokenizer: Any, conversations: Conversations) -> None:
    """Raise EvaluationError early for conversations that `chat_perplexity` could not use."""
    if not list(_answers(tokenizer, conversations)):
        raise _no_answers(conversations)


def chat_perplexity(model: nn.Module, tokenizer: Any, conversations: Conversations) -> ChatPerplexity:
    """Perplexity of the assistant's turns given all previous text; an answer includes the end of its turn.

    conversations: messages with `role` and `content`, by file and line; a context beyond MAX_TOKENS or the model's
    positions is cut at its beginning, an answer at its end. Raises EvaluationError for a tokenizer without chat
    template, and for conversations without answers or that the template rejects or renders out of order.
    """
    max_tokens = read_at_once(model, MAX_TOKENS)
    losses = []
    for texts in _answers(tokenizer, conversations):
        context, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        answer = answer[: max_tokens - 1]
        if context and answer:
            losses.append(continuation(model, context[-(max_tokens - len(answer)) :], answer)[0])
    if not losses:
        raise _no_answers(conversations)
    nll = float(torch.cat(losses).mean())
    return ChatPerplexity(value=math.exp(nll), nll=nll, tokens=sum(map(len, losses)), turns=len(losses))


def _answers(tokenizer: Any, conversations: Conversations) -> Iterator[tuple[str, str]]:
    """Each answer to a message, with the text before it."""
    for place, conversation in conversations.items():
        turns = answer_turns(place, conversation, tokenizer, error=EvaluationError)
        yield from (turn for turn in turns if turn[0])


def _no_answers(conversations: Conversations) -> EvaluationError:
    first = next(iter(conversations), "the file")
    what = f"{first} has no turn of an assistant after another message, and no other conversation has one"
    return EvaluationError(what, "Give messages with role `assistant`")
