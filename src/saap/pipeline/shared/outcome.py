"""Before and after: the dense and the pruned model on the same text and prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from saap.core.errors import EvaluationError
from saap.core.evaluation_records import Perplexity
from saap.data.texts import GENERAL
from saap.evaluation.generation import prompt_ids, write
from saap.evaluation.perplexity import joint_perplexity, perplexities
from saap.models.walk.probe import positions
from saap.models.walk.spill import Spill
from saap.pipeline.shared.tokens import TokenSets, logits_of

QUESTION = "What is the capital of France?"
OPENING = "The capital of France is"
ANSWER_TOKENS = 32


class Behaviour(BaseModel):
    """Figures of a model: perplexities on the evaluation texts, and a greedy answer to `prompt` ('' if none).

    kinds: perplexity on each kind of text. perplexity: on the kinds of general English together.
    """

    model_config = ConfigDict(frozen=True)

    perplexity: float
    prompt: str
    answer: str
    kinds: dict[str, float] = {}


def observe(
    model: nn.Module,
    tokenizer: Any | None,
    tokens: TokenSets,
    spill: Spill | None = None,
    known: Mapping[str, Perplexity] | None = None,
) -> Behaviour:
    """Perplexities, per token of the dense model, and a greedy answer of `model`.

    known: its perplexities if measured already. spill: for offloaded weights. Such a model generates no answer, since
    each token would read all weights.
    """
    read = None if spill is None else logits_of(model, spill.keep)
    found = known
    if not found:
        found = tokens.per_dense_token(perplexities(model, tokens.evaluation, leading=tokens.leading, read=read))
    return behaviour(found, *greedy_answer(model, tokenizer if read is None else None))


def behaviour(found: Mapping[str, Perplexity], prompt: str, answer: str) -> Behaviour:
    """The figures of a model from its perplexities by kind, and its answer to a prompt."""
    value = joint_perplexity(one for kind, one in found.items() if kind in GENERAL or len(found) == 1)
    kinds = {kind: _or_infinite(one.value) for kind, one in found.items()}
    return Behaviour(perplexity=_or_infinite(value), prompt=prompt, answer=answer, kinds=kinds)


def _or_infinite(perplexity: float) -> float:
    """The perplexity, infinite where it is not a number: records have no other word for what predicts nothing."""
    return math.inf if math.isnan(perplexity) else perplexity


def greedy_answer(model: nn.Module, tokenizer: Any | None) -> tuple[str, str]:
    """A short prompt (through the chat template if there is one) and the model's greedy continuation.

    Both are '' for a model that cannot generate, has no tokenizer, none that knows the prompt's letters, no positions
    after it, or a chat template that does not accept it.
    """
    if tokenizer is None or not hasattr(model, "generate"):
        return "", ""
    prompt = QUESTION if getattr(tokenizer, "chat_template", None) else OPENING
    try:
        length = len(prompt_ids(tokenizer, prompt))
    except EvaluationError:
        return "", ""
    room = min(ANSWER_TOKENS, (positions(model) or math.inf) - length)
    if room < 1 or not length:
        return "", ""
    (written,) = write(model, tokenizer, [prompt], tokens=int(room), sampled=False)
    return prompt, written.text.strip()
