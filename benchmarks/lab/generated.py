"""Text that the model itself writes, as token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from saap.core.records import IntArray


@torch.no_grad()
def sample_from_model(
    model: Any,
    *,
    sequences: int,
    length: int,
    batch: int,
    seed: int,
    starts: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> IntArray:
    """Token ids (sequences, length) sampled from the model's own distribution, `batch` sequences at a time.

    starts: what the sequences begin with, one after the other and again from the first, all of one length. End-of-text
    tokens are ordinary tokens, which end nothing.
    The same seed, batch and device give the same ids; the global random state is left as it was.
    progress: called with (sequences done, sequences).
    """
    begin = [list(starts[index % len(starts)]) for index in range(sequences)]
    device = next(model.parameters()).device
    pieces: list[torch.Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for done in range(0, sequences, batch):
            prompt = torch.tensor(begin[done : done + batch], device=device)
            # Every shaping of the distribution that the model's own generation defaults may ask for is switched off.
            written = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length - prompt.shape[1],
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, eos_token_id=None,
                pad_token_id=0,  # has to be known, and is never used
                use_cache=True,
                # Growing caches are copied for every token; models that fix the sizes of everything can do without.
                cache_implementation="static" if getattr(model, "_can_compile_fullgraph", False) else None,
                disable_compile=True,
            )  # fmt: skip
            pieces.append(written.cpu())
            if progress is not None:
                progress(done + len(prompt), sequences)
    return np.asarray(torch.cat(pieces), dtype=np.int64)


def random_starts(tokenizer: Any, *, sequences: int, seed: int, leading: Sequence[int] = ()) -> list[list[int]]:
    """A random token of the vocabulary for each sequence, so that what a model writes after it differs in kind.

    Special tokens are left out. leading: ids that come before it (BOS).
    Source: the data generation of LLM-QAT (Liu et al. 2023).
    """
    special = set(tokenizer.all_special_ids)
    ordinary = np.array([token for token in range(len(tokenizer)) if token not in special])
    return [[*leading, int(token)] for token in np.random.default_rng(seed).choice(ordinary, size=sequences)]
