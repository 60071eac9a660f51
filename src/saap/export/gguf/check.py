"""Comparison of a GGUF file in llama.cpp with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saap.core.errors import CalibrationError
from saap.data.samples import token_stream
from saap.data.texts import evaluation_text
from saap.export.source import ExportSource
from saap.models.loading.llama_cpp import LlamaCpp

CHECKED_TOKENS = 512
WINDOW = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """tokens: compared positions. equal: positions with the same most likely next token.

    divergence: mean Kullback-Leibler divergence of the second from the first prediction, in nats.
    """

    tokens: int
    equal: int
    divergence: float

    @property
    def share(self) -> float:
        """Fraction of the positions with the same most likely next token."""
        return self.equal / self.tokens


def check_in_llama_cpp(source: ExportSource, file: Path, context: int) -> tuple[Agreement, bool]:
    """Agreement with the transformers model in float32, and whether both tokenizers agree on the checked text."""
    model, text, window = source.model(), evaluation_text(), min(WINDOW, context)
    with LlamaCpp(file, context=window, threads=torch.get_num_threads(), exact=True) as runtime:
        ids = token_stream([text], source.tokenizer)[:CHECKED_TOKENS].tolist()
        checked = text[: 4 * CHECKED_TOKENS]
        same = runtime.tokenize(checked) == token_stream([checked], source.tokenizer).tolist()
        return compare_with_llama_cpp(model, runtime, ids, window=window), same


@torch.no_grad()
def compare_with_llama_cpp(model: Any, runtime: LlamaCpp, ids: Sequence[int], *, window: int = WINDOW) -> Agreement:
    """Agreement of a transformers model and a GGUF file on `ids`, in independent windows.

    window: at most the runtime's context. Raises CalibrationError if there are no tokens.
    """
    if not ids:
        raise CalibrationError("There are no tokens to compare on", "Give a longer text")
    device = next(model.parameters()).device
    equal, divergence = 0, 0.0
    for first in range(0, len(ids), window):
        part = ids[first : first + window]
        expected = model(torch.tensor([list(part)], device=device), use_cache=False).logits[0].cpu()
        found = torch.from_numpy(runtime.logits(part))
        one, two = (torch.log_softmax(logits.double(), dim=-1) for logits in (expected, found))
        equal += int((one.argmax(-1) == two.argmax(-1)).sum())
        divergence += float((one.exp() * (one - two)).sum(-1).mean()) * len(part)
    return Agreement(tokens=len(ids), equal=equal, divergence=divergence / len(ids))
