"""Perplexity of a causal language model on a stream of token ids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saap.core.errors import CalibrationError
from saap.core.evaluation_records import Perplexity
from saap.core.records import IntArray, digest_of
from saap.models.checkpoint.layer_fields import text_part
from saap.models.walk.probe import read_at_once
from saap.models.walk.walker import inference_only, without_cache

# Limit on the logits of one forward pass in float32, the largest tensor of an evaluation.
LOGITS_BYTES = 2**28
POSITIONS_PER_CHUNK = 256
WINDOW = 512

LogitsOf = Callable[[Sequence[Tensor]], Iterator[Tensor]]
"""Function from batches of token ids (sequences, tokens) to their logits."""


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target] in nats, float64.

    logits: (tokens, vocabulary). targets: (tokens,). Computed in float32 at least, a slice of tokens at a time.
    """
    total = torch.zeros((), dtype=torch.float64)
    for scores, wanted in zip(
        torch.split(logits, POSITIONS_PER_CHUNK), torch.split(targets, POSITIONS_PER_CHUNK), strict=True
    ):
        scores = scores if scores.dtype == torch.float64 else scores.float()
        total += nn.functional.cross_entropy(scores, wanted, reduction="sum").cpu().double()
    return total


def default_window(model: nn.Module) -> int:
    """Default tokens per window: 512, limited by the model's positions."""
    return read_at_once(model, WINDOW)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    token_ids: IntArray | Tensor,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int = 4,
    max_tokens: int | None = None,
    leading: Sequence[int] = (),
) -> Perplexity:
    """Perplexity over windows of `token_ids` (n,), each read on its own.

    window: tokens per window, None for `default_window`. stride: tokens of the text between the starts of two windows;
    None: consecutive windows. The first window of w tokens predicts its last w - 1. Each further window predicts the
    tokens that no earlier window contains (again w - 1 for consecutive windows). A shorter last window counts if it
    predicts something. leading: ids prepended to each window (BOS, see `leading_ids`), so that its first token of the
    text is predicted too.
    max_tokens: limit on the evaluated tokens. batch: windows per forward pass, fewer for a large vocabulary.
    model: any module that maps ids (batch, tokens) to logits (batch, tokens, vocabulary), an output with `.logits`, or
    a tuple that starts with them. Evaluated without dropout; its training flags are restored.
    Raises CalibrationError for fewer than 2 tokens, a window below 2, or a stride below 1 or above the tokens of the
    text in a window.
    """
    text = {"": _stream(token_ids)[:max_tokens]}
    return perplexities(model, text, window=window, stride=stride, batch=batch, leading=leading)[""]


@torch.no_grad()
def perplexities(
    model: nn.Module,
    texts: Mapping[str, IntArray | Tensor],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int = 4,
    leading: Sequence[int] = (),
    read: LogitsOf | None = None,
) -> dict[str, Perplexity]:
    """Perplexity of several texts, ids (n,) by name; see `perplexity`.

    read: returns the logits of all batches of windows, of all texts, in place of one call of the model for each.
    """
    window = default_window(model) if window is None else window
    ids = {name: _stream(text) for name, text in texts.items()}
    shortest = min(map(len, ids.values()))
    if shortest < 2 or window < 2:
        raise CalibrationError(
            f"perplexity needs windows and a text of at least 2 tokens, not {window} and {shortest}",
            "Give a longer text or window",
        )
    size = window - len(leading)
    stride = size if stride is None else stride
    if not 1 <= stride <= size:
        raise CalibrationError(f"a stride of {stride} does not fit a window of {window}", f"Give 1 to {size}")
    vocabulary = getattr(text_part(getattr(model, "config", None)), "vocab_size", None)
    if isinstance(vocabulary, int):
        batch = max(1, min(batch, LOGITS_BYTES // (4 * window * vocabulary)))
    device = next(model.parameters()).device
    total = {name: torch.zeros((), dtype=torch.float64) for name in ids}
    predicted = dict.fromkeys(ids, 0)
    with inference_only(model):
        batches = [(name, *one) for name, text in ids.items() for one in _batches(text, size, stride, batch, leading)]
        inputs = [windows.to(device) for _, windows, _ in batches]
        outputs = (model_logits(model, one) for one in inputs) if read is None else read(inputs)
        for (name, windows, context), all_logits in zip(batches, outputs, strict=True):
            logits = all_logits[:, context - 1 : -1]
            targets = windows[:, context:].to(logits.device)
            total[name] += token_nll(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
            predicted[name] += targets.numel()
    return {
        name: Perplexity(
            value=_exponential(float(total[name]) / predicted[name]), nll=float(total[name]) / predicted[name],
            tokens=predicted[name], window=window, stride=stride, text_digest=digest_of(text.numpy()),
            leading=len(leading),
        )
        for name, text in ids.items()
    }  # fmt: skip


def joint_perplexity(found: Iterable[Perplexity]) -> float:
    """Joint perplexity of several texts, weighted by predicted tokens."""
    parts = list(found)
    return _exponential(sum(one.nll * one.tokens for one in parts) / sum(one.tokens for one in parts))


def _stream(text: IntArray | Tensor) -> Tensor:
    ids = torch.as_tensor(np.asarray(text.cpu() if isinstance(text, Tensor) else text))
    return ids.reshape(-1).long()


def _exponential(nll: float) -> float:
    """exp(nll): infinite on overflow, NaN for a NaN loss."""
    if math.isnan(nll):
        return math.nan
    return math.exp(nll) if nll < math.log(np.finfo(np.float64).max) else math.inf


def _batches(ids: Tensor, size: int, stride: int, batch: int, leading: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
    """Batches of windows (<= batch, leading + size) with an equal number of context tokens, and that number.

    size: tokens of the text in a window.
    """
    first = max(1, len(leading))  # context of a window without a predecessor
    overlap = max(first, len(leading) + size - stride)
    full = ids.unfold(0, min(size, len(ids)), stride)
    alone = int(overlap > first)
    others = [(windows, overlap) for windows in torch.split(full[alone:], batch)]
    for windows, context in ((full[:alone], first), *others, (ids[None, len(full) * stride :], overlap)):
        if len(windows) and len(leading) + windows.shape[1] > context:
            before = torch.tensor(leading, dtype=ids.dtype).expand(len(windows), -1)
            yield torch.cat([before, windows], dim=1), context


def model_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (batch, tokens, vocabulary) of `ids` (batch, tokens), from any usual output of a model."""
    output = model(ids, **without_cache(model))
    logits = getattr(output, "logits", output)
    tensor: Tensor = logits[0] if isinstance(logits, tuple) else logits
    return tensor


def bits_per_byte(perplexity: float, ids: IntArray, tokenizer: Any) -> float:
    """Bits per byte of a model with this perplexity on the text of these ids (tokens,)."""
    size = len(tokenizer.decode(ids, skip_special_tokens=True).encode()) / len(ids)  # without unknown characters
    return math.log2(perplexity) / size if size else math.inf
