"""How far two runtimes, or two versions of a model, predict the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.errors import CalibrationError
from saap.models.loading.llama_cpp import LlamaCpp


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """tokens: positions compared. equal: of them with the same most likely next token.

    divergence: mean Kullback-Leibler divergence of the second from the first prediction, in nats. largest: of all
    differences of log-probabilities among the first model's most likely tokens.
    """

    tokens: int
    equal: int
    divergence: float
    largest: float

    @property
    def share(self) -> float:
        """Fraction of the positions with the same most likely next token."""
        return self.equal / self.tokens


def compare_logits(first: Tensor, second: Tensor) -> Agreement:
    """Agreement of two predictions of the same tokens. first, second: logits (tokens, vocabulary)."""
    one, two = (nn.functional.log_softmax(logits.double(), dim=-1) for logits in (first, second))
    best = one.argmax(-1)
    differences = (one - two).gather(-1, best[:, None]).abs()
    return Agreement(
        tokens=len(first),
        equal=int((best == two.argmax(-1)).sum()),
        divergence=float((one.exp() * (one - two)).sum(-1).mean()),
        largest=float(differences.max()),
    )


@torch.no_grad()
def compare_with_llama_cpp(model: Any, runtime: LlamaCpp, ids: Sequence[int], *, window: int = 256) -> Agreement:
    """Agreement of a transformers model and a GGUF file on `ids`, read in windows that each begin anew.

    window: at most the runtime's context. Raises CalibrationError if there are no tokens.
    """
    parts = [_window_agreement(model, runtime, part) for part in _windows(ids, window)]
    if not parts:
        raise CalibrationError("There are no tokens to compare on", "Give a longer text")
    tokens = sum(part.tokens for part in parts)
    return Agreement(
        tokens=tokens,
        equal=sum(part.equal for part in parts),
        divergence=sum(part.divergence * part.tokens for part in parts) / tokens,
        largest=max(part.largest for part in parts),
    )


def _windows(ids: Sequence[int], window: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(ids), window):
        yield ids[first : first + window]


def _window_agreement(model: Any, runtime: LlamaCpp, ids: Sequence[int]) -> Agreement:
    device = next(model.parameters()).device
    expected = model(torch.tensor([list(ids)], device=device), use_cache=False).logits[0].cpu()
    return compare_logits(expected, torch.from_numpy(runtime.logits(ids)))
