"""Training sequences that the trained model writes itself: on-policy distillation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from saap.core.records import IntArray
from saap.data.training import Example
from saap.models.loading.pretrained import plain_generation

BEGINNING = 32
"""Tokens that a plain text keeps."""
WRITTEN = 256
"""Tokens that the model writes at most: each costs a pass over all weights."""
AT_ONCE = 8
"""Sequences that are written together, so that a pass over the weights serves all of them."""


@torch.no_grad()
def continued(
    model: Any, examples: Sequence[Example], *, length: int, ends: Collection[int], seed: int
) -> list[Example]:
    """The examples with another end: what the model writes after their beginnings, sampled at temperature 1.

    A beginning is the prompt of a conversation, or 32 tokens of a text, at most half of `length`. What is written ends
    with the first of the end-of-text tokens `ends`; the teacher has a target for all of it. length: tokens of a
    sequence at most. Examples whose beginning takes more than half of it, or all of the example, stay as they are.
    Source: on-policy distillation of Agarwal et al. 2024 (GKD), with all sequences written by the model.
    """
    beginnings = [one.tokens[: one.prompt or min(BEGINNING, length // 2)] for one in examples]
    places = [
        place for place, (one, beginning) in enumerate(zip(examples, beginnings, strict=True))
        if len(beginning) < len(one.tokens) and len(beginning) <= length // 2
    ]  # fmt: skip
    found, device = list(examples), next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), plain_generation(model, ends):
        torch.manual_seed(seed)
        for first in range(0, len(places), AT_ONCE):
            part = places[first : first + AT_ONCE]
            written = _written(model, [torch.from_numpy(beginnings[place]) for place in part], length)
            for place, row in zip(part, written, strict=True):
                found[place] = _joined(beginnings[place], row, ends)
    return found


def _written(model: Any, prompts: list[Tensor], length: int) -> IntArray:
    """What the model writes after each prompt, (prompts, tokens) ids. length: tokens of both together at most."""
    device = next(model.parameters()).device
    padded = partial(pad_sequence, batch_first=True, padding_side="left")
    ids, mask = padded(prompts).to(device), padded([torch.ones_like(prompt) for prompt in prompts]).to(device)
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=min(WRITTEN, length - ids.shape[1]), do_sample=True,
        top_k=0, pad_token_id=0,
    )  # fmt: skip
    written: IntArray = made[:, ids.shape[1] :].cpu().numpy()
    return written


def _joined(beginning: IntArray, written: IntArray, ends: Collection[int]) -> Example:
    """A beginning and what follows it, with the first end-of-text token."""
    places = np.flatnonzero(np.isin(written, list(ends)))
    kept = written[: int(places[0]) + 1] if len(places) else written
    tokens = np.concatenate([beginning, kept]).astype(np.int64)
    return Example(tokens, np.arange(len(tokens)) > 0, prompt=len(beginning))
