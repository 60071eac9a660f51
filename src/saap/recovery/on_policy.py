"""Training sequences that the trained model writes itself: on-policy distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saap.data.training import Example

BEGINNING = 32
"""Tokens that a sequence keeps at least."""
WRITTEN = 256
"""Tokens that the model writes at most: each costs a pass over all weights."""
AT_ONCE = 8
"""Sequences that are written together, so that a pass over the weights serves all of them."""


@torch.no_grad()
def continued(model: Any, examples: Sequence[Example], *, length: int, end: int | None, seed: int) -> list[Example]:
    """The examples with another end: what the model writes after their beginnings, sampled at temperature 1.

    A beginning is all before the first learned token, and at least 32 tokens. What is written has a loss, up to the
    end-of-text token. length: tokens of a sequence at most. Source: on-policy distillation of Agarwal et al. 2024
    (GKD), with all sequences written by the model.
    """
    beginnings = [one.tokens[: max(int(one.learned.argmax()), BEGINNING)] for one in examples]
    most = min(WRITTEN, length - min(map(len, beginnings)))
    if most < 1:
        return list(examples)
    device = next(model.parameters()).device
    ids, mask = _padded_before(beginnings, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, eos_token_id=end, pad_token_id=0,
        )  # fmt: skip
    rows = zip(beginnings, made[:, ids.shape[1] :].cpu().numpy(), strict=True)
    return [_joined(beginning, row, end, length) for beginning, row in rows]


def _padded_before(beginnings: Sequence[np.ndarray[Any, Any]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(sequences, longest) ids and their attention mask; shorter ones are padded at the start."""
    longest = max(map(len, beginnings))
    ids = torch.zeros(len(beginnings), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, beginning in enumerate(beginnings):
        ids[row, longest - len(beginning) :] = torch.from_numpy(beginning)
        mask[row, longest - len(beginning) :] = 1
    return ids.to(device), mask.to(device)


def _joined(beginning: np.ndarray[Any, Any], written: np.ndarray[Any, Any], end: int | None, length: int) -> Example:
    """A beginning and what follows it until the end-of-text token, which is learned too."""
    ends = np.flatnonzero(written == end) if end is not None else np.empty(0, np.int64)
    kept = written[: int(ends[0]) + 1] if len(ends) else written
    tokens = np.concatenate([beginning, kept])[:length].astype(np.int64)
    return Example(tokens, np.arange(len(tokens)) >= len(beginning))
