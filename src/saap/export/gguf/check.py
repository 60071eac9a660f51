"""Comparison of a GGUF file in llama.cpp with transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saap.core.errors import CalibrationError
from saap.data.samples import token_stream
from saap.data.texts import evaluation_text
from saap.models.loading.llama_cpp import LlamaCpp

WINDOW = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """tokens: compared positions. equal: positions with the same most likely next token.

    divergence: mean Kullback-Leibler divergence of the second from the first prediction, in nats. perplexity_ratio:
    perplexity of the second over that of the first.
    """

    tokens: int
    equal: int
    divergence: float
    perplexity_ratio: float

    @property
    def share(self) -> float:
        """Fraction of the positions with the same most likely next token."""
        return self.equal / self.tokens


def check_in_llama_cpp(
    model: Any, tokenizer: Any, files: Sequence[Path], window: int, tokens: int
) -> tuple[list[Agreement], bool]:
    """Agreement of each file with the transformers model, and whether both tokenizers agree on the checked text."""
    text = evaluation_text()
    ids = token_stream([text], tokenizer)[:tokens].tolist()
    with ExitStack() as opened:
        runtimes = [
            opened.enter_context(LlamaCpp(file, context=window, threads=torch.get_num_threads(), exact=True))
            for file in files
        ]
        checked = text[: 4 * tokens]
        same = runtimes[0].tokenize(checked) == token_stream([checked], tokenizer).tolist()
        return compare_with_llama_cpp(model, runtimes, ids, window=window), same


@torch.no_grad()
def compare_with_llama_cpp(
    model: Any, runtimes: Sequence[LlamaCpp], ids: Sequence[int], *, window: int = WINDOW
) -> list[Agreement]:
    """Agreement of a transformers model and each of some GGUF files on `ids`, in independent windows.

    window: at most the runtimes' context. Raises CalibrationError if there are no tokens.
    """
    if not ids:
        raise CalibrationError("There are no tokens to compare on", "Give a longer text")
    device = next(model.parameters()).device
    sums = torch.zeros(len(runtimes), 3, dtype=torch.float64)  # equal predictions, divergence, difference of losses
    for first in range(0, len(ids), window):
        part = torch.tensor(list(ids[first : first + window]))
        logits = model(part.unsqueeze(0).to(device), use_cache=False).logits[0].cpu()
        expected = torch.log_softmax(logits.double(), dim=-1)
        for total, runtime in zip(sums, runtimes, strict=True):
            found = torch.log_softmax(torch.from_numpy(runtime.logits(part.tolist())).double(), dim=-1)
            total[0] += (expected.argmax(-1) == found.argmax(-1)).sum()
            total[1] += (expected.exp() * (expected - found)).sum()
            total[2] += (expected - found)[:-1].gather(1, part[1:, None]).sum()
    predicted = max(1, len(ids) - -(-len(ids) // window))
    return [
        Agreement(
            tokens=len(ids), equal=int(equal), divergence=divergence / len(ids),
            perplexity_ratio=math.exp(difference / predicted),
        )
        for equal, divergence, difference in sums.tolist()
    ]  # fmt: skip
