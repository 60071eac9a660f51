"""Before and after: what the dense and the pruned model do with the same text and prompt."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from saap.evaluation.generation import prompt_ids
from saap.evaluation.perplexity import perplexity
from saap.models.walk.offload import offloaded
from saap.models.walk.probe import positions
from saap.models.walk.spill import Spill
from saap.models.walk.walk import layerwise_logits
from saap.models.walk.walker import BlockWalker
from saap.pipeline.shared.tokens import TokenSets

QUESTION = "What is the capital of France?"
OPENING = "The capital of France is"
ANSWER_TOKENS = 32


class Behaviour(BaseModel):
    """What a model does: perplexity on the evaluation text, and a greedy answer to `prompt` ('' without tokenizer)."""

    model_config = ConfigDict(frozen=True)

    perplexity: float
    prompt: str
    answer: str


def observe(model: nn.Module, tokenizer: Any | None, tokens: TokenSets, spill: Spill | None = None) -> Behaviour:
    """Perplexity and a greedy answer of `model`.

    spill: for a model whose weights are in files. It gives no answer, of which each token would read all of them.
    """
    away, read = offloaded(model), None
    if away is not None and spill is not None:
        read = partial(layerwise_logits, BlockWalker(model, away.blocks), keep=spill.keep)
    value = perplexity(model, tokens.evaluation, leading=tokens.leading, read=read).value
    prompt, answer = greedy_answer(model, tokenizer if read is None else None)
    return Behaviour(perplexity=value, prompt=prompt, answer=answer)


@torch.no_grad()
def greedy_answer(model: nn.Module, tokenizer: Any | None) -> tuple[str, str]:
    """A short prompt (through the chat template if there is one) and the model's greedy continuation.

    Both are '' for a model that cannot generate, has no tokenizer, or no positions after the prompt.
    """
    generate = getattr(model, "generate", None)
    if tokenizer is None or generate is None:
        return "", ""
    device = next(model.parameters()).device
    prompt = QUESTION if getattr(tokenizer, "chat_template", None) else OPENING
    ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)
    room = min(ANSWER_TOKENS, (positions(model) or math.inf) - ids.shape[1])
    if room < 1:
        return "", ""
    made = generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(room), do_sample=False,
        pad_token_id=tokenizer.pad_token_id or 0,
    )  # fmt: skip
    return prompt, str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()
