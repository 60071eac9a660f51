"""Which tokens stay: pure functions of counts, of the embedding's rows, and of what each token is built from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from saap.core.errors import TargetError
from saap.core.records import FloatArray, IntArray

WIDEST = 1024
"""Dimensions of the embedding that the regression uses; wider rows are projected at random."""
RIDGE = 100.0
ROWS_AT_ONCE = 8192
COUNTED = 0.2
"""Weight of the logarithm of a token's rate in the texts, on the scale of the regression's targets -1 and 1."""
LEARNT, FIRST_IDS = 0.05, 1000
"""Weight of the logarithm of a token's id, which follows the order of learning: earlier ones are more frequent."""
TEXT_SIZE = 200_000
"""Tokens of a text to which all counts are scaled, so that a short text of one language counts like a long one."""
SEED = 0

Needs = Callable[[int], tuple[int, ...] | None]


@torch.no_grad()
def likeness(rows: Tensor, seen: Mapping[str, IntArray]) -> dict[str, FloatArray]:
    """How much each token is like those that a language uses, from its row in the embedding.

    rows: (tokens, dimensions). seen: for each language, how often its texts use each token, (tokens,). Returns for each
    language a score (tokens,): a ridge regression on the rows, scaled to one length, with the target 1 for used tokens
    and -1 for all others, either half of the weight. So a small text tells of tokens that it does not have, since the
    tokens of one language lie together in the embedding.
    """
    dimensions = min(rows.shape[1], WIDEST)
    generator = torch.Generator().manual_seed(SEED)
    mixing = None if dimensions == rows.shape[1] else torch.randn(rows.shape[1], dimensions, generator=generator)

    def features(part: Tensor) -> Tensor:
        part = part.to("cpu", torch.float32)
        part = part if mixing is None else part @ mixing
        part = part / part.norm(dim=1, keepdim=True).clamp_min(1e-9) * dimensions**0.5
        return torch.cat([part, part.new_ones(len(part), 1)], dim=1)

    parts = torch.split(rows, ROWS_AT_ONCE)
    gram = torch.zeros(dimensions + 1, dimensions + 1)
    total = torch.zeros(dimensions + 1)
    for part in parts:
        x = features(part)
        gram += x.T @ x
        total += x.sum(dim=0)
    damping = RIDGE * torch.eye(dimensions + 1)
    solved = {}
    for language, counts in seen.items():
        used = torch.from_numpy(counts > 0)
        share = float(used.double().mean())
        if not 0 < share < 1:
            solved[language] = torch.zeros(dimensions + 1)
            continue
        x = features(rows[used.to(rows.device)])
        heavy, light = 0.5 / share, 0.5 / (1 - share)
        weighted = light * gram + (heavy - light) * (x.T @ x)
        of_used = x.sum(dim=0)
        solved[language] = torch.linalg.solve(weighted + damping, heavy * of_used - light * (total - of_used))
    found = torch.cat([features(part) @ torch.stack(list(solved.values()), dim=1) for part in parts])
    return {language: found[:, place].double().numpy() for place, language in enumerate(solved)}


def order_by_use(counts: Mapping[str, IntArray], scores: Mapping[str, FloatArray]) -> IntArray:
    """Ids of all tokens, the most useful first.

    counts: by language, how often its texts use each token (tokens,). scores: `likeness` by language. A token is as
    useful as to the language that it serves best; of equal ones, that with the lower id is first.
    """
    best = np.full(len(next(iter(counts.values()))), -np.inf)
    for language, used in counts.items():
        rate = used * (TEXT_SIZE / max(1, used.sum()))
        best = np.maximum(best, scores[language] + COUNTED * np.log1p(rate))
    best -= LEARNT * np.log(np.arange(len(best)) + FIRST_IDS)
    return np.argsort(-best, kind="stable")


def with_needs(tokens: Collection[int], needs: Needs) -> set[int]:
    """These tokens and all that they are built from."""
    found = set(tokens)
    for token in tokens:
        found.update(needs(token) or ())
    return found


def keep_tokens(
    order: Sequence[int] | IntArray, required: Collection[int], needs: Needs, size: int, step: int = 1
) -> tuple[int, ...]:
    """Ids of the tokens to keep, ascending: the required ones, then by the order, with what they are built from.

    size: their number, rounded down to a multiple of `step`. A token that does not fit any more with what it needs is
    passed over, until smaller ones have filled the room. Tokens that the tokenizer never produces are not kept. Fewer
    are kept if there are no more. Raises TargetError if more are required.
    """
    kept = with_needs(required, needs)
    requested, size, least = size, size // step * step, -(-len(kept) // step) * step
    if least > size:
        raise TargetError(
            f"{len(kept):,} tokens have to stay, which needs {least:,} rows, more than the {requested:,} to keep: "
            "single bytes or characters, special and added tokens, digits, and the tokens of the chat template and of "
            "your own text, with what they are built from",
            f"Keep at least {least:,}",
        )
    waiting = [int(token) for token in order if token not in kept]
    while len(kept) < size and waiting:
        left, before = [], len(kept)
        for token in waiting:
            if len(kept) == size:
                break
            needed = needs(token)
            if needed is None or token in kept:
                continue
            new = {token, *needed} - kept
            if len(kept) + len(new) <= size:
                kept |= new
            else:
                left.append(token)
        waiting = left if len(kept) > before else []
    return tuple(sorted(kept))


def size_for_coverage(
    order: Sequence[int] | IntArray, required: Collection[int], needs: Needs, texts: Mapping[str, IntArray],
    coverage: float,
) -> int:  # fmt: skip
    """The least number of tokens that covers this share of the tokens in each text.

    order: made without these texts. texts: how often each text uses each token, (tokens,).
    """
    kept = with_needs(required, needs)
    missing = {name: (1 - coverage) * used.sum() + 1e-6 for name, used in texts.items()}  # counts are whole
    left = {name: float(used.sum() - used[list(kept)].sum()) for name, used in texts.items()}
    for token in map(int, order):
        if all(left[name] <= missing[name] for name in texts):
            break
        needed = needs(token)
        if needed is None:
            continue
        for new in {token, *needed} - kept:
            kept.add(new)
            for name, used in texts.items():
                left[name] -= float(used[new])
    return len(kept)
