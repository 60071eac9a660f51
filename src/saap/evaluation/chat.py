"""Perplexity of the answers in conversations, written out with the model's own chat template."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from saap.core.errors import EvaluationError
from saap.core.evaluation_records import ChatPerplexity
from saap.evaluation.generation import continuation_nll
from saap.models.walk.probe import read_at_once

Conversation = Sequence[dict[str, Any]]


def answer_spans(tokenizer: Any, conversation: Conversation) -> Iterator[tuple[list[int], list[int]]]:
    """Context and answer token ids of each of the assistant's turns; the answer ends as the template ends a turn.

    Raises EvaluationError for a conversation that the template refuses or writes out of order.
    """
    for index, message in enumerate(conversation):
        if message.get("role") != "assistant":
            continue
        try:
            before = tokenizer.apply_chat_template(
                list(conversation[:index]), tokenize=False, add_generation_prompt=True
            )
            whole = tokenizer.apply_chat_template(list(conversation[: index + 1]), tokenize=False)
        except Exception as error:  # templates are programs of the model's makers: they may raise anything
            raise EvaluationError(
                f"a conversation does not fit the chat template ({type(error).__name__}: {error})",
                "Give each message a `role` and a `content` that the template knows",
            ) from error
        if not whole.startswith(before):
            raise EvaluationError(
                "the chat template does not continue its own generation prompt, so answers cannot be told apart",
                "Leave out --chat for this model",
            )
        context, answer = (
            [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
            for text in (before, whole[len(before) :])
        )
        if context and answer:
            yield context, answer


def chat_perplexity(
    model: nn.Module, tokenizer: Any, conversations: Sequence[Conversation], *, max_tokens: int = 1024
) -> ChatPerplexity:
    """Perplexity of the assistant's turns, each given all before it.

    conversations: lists of messages with `role` and `content`. max_tokens: of a context and answer, fewer where the
    model has no more positions; a longer context loses its beginning, a longer answer its end.
    Raises EvaluationError for a tokenizer without chat template, or conversations without answers.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise EvaluationError("the model's tokenizer has no chat template", "Leave out --chat")
    max_tokens = read_at_once(model, max_tokens)
    losses = []
    for conversation in conversations:
        for context, answer in answer_spans(tokenizer, conversation):
            answer = answer[: max_tokens - 1]
            losses.append(continuation_nll(model, context[-(max_tokens - len(answer)) :], answer))
    if not losses:
        raise EvaluationError("the conversations have no turn of an assistant", "Give messages with role `assistant`")
    nll = float(torch.cat(losses).mean())
    return ChatPerplexity(value=math.exp(nll), nll=nll, tokens=sum(map(len, losses)), turns=len(losses))
