"""How a text is used: some sequences for the least squares, others for the distillation, and some of each held out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from saap.core.errors import CalibrationError

HELD_OUT_SHARE = 0.125
HELD_OUT_AT_LEAST = 4
"""Sequences that choose the ridge, where there are twice as many: the held-out error of fewer is too noisy."""
MICRO_BATCH = 4
"""Sequences at a time."""
LEAST_SEQUENCES = 4
"""Of so many the distillation gets half, as there is little left to learn from fitted ones. Fewer are all fitted."""
EVALUATED_SEQUENCES = 8
"""That say whether the distillation was of use, at most."""
DISTILLED_LENGTH = 128
"""Tokens of a sequence of the distillation: many small steps learn more from the same text than a few large ones."""


def held_out_sequences(sequences: int) -> int:
    """How many of the sequences only choose the ridge; at least one stays to fit. sequences: two or more."""
    return max(round(sequences * HELD_OUT_SHARE), min(HELD_OUT_AT_LEAST, sequences // 2))


def rows_to_fit_on(sequences: int, index: int, rows: int) -> int:
    """How many rows of a micro-batch are fitted; the others are held out. rows: of its tokens, sequence by sequence.

    sequences: of all micro-batches, of which the last ones are held out. index: of this micro-batch.
    """
    first = index * MICRO_BATCH
    here, fitted = min(MICRO_BATCH, sequences - first), sequences - held_out_sequences(sequences) - first
    return rows * min(max(0, fitted), here) // here


def require_sequences(sequences: int) -> None:
    """Raise CalibrationError for a single sequence, of which none would be left to choose the ridge."""
    if sequences < 2:
        raise CalibrationError(
            f"The least-squares reconstruction has {sequences} sequence of text, but it fits on some and chooses the "
            "ridge on others",
            "Give more calibration text, or use --no-restore",
        )


def divided(
    tokens: Tensor, seed: int, leading: Sequence[int], *, share: float = 0.5, length: int = DISTILLED_LENGTH
) -> tuple[Tensor, Tensor, int]:
    """The sequences to fit on, those to distil on, and how many of the latter, the last ones, are held out.

    tokens: (sequences, length) ids, at random to one or the other. leading: ids that every sequence begins with, if
    the given ones do. share: of the sequences for the distillation. length: of those, at most, which are cut to it.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = _shuffled(tokens, generator)
    fitted = len(tokens) - (int(share * len(tokens)) if len(tokens) >= LEAST_SEQUENCES else 0)
    tokens, others = tokens[:fitted], tokens[fitted:]
    evaluated = len(others) - min(held_out_sequences(len(others)), EVALUATED_SEQUENCES)
    pieces = shorter(others, length, leading)  # all of one length
    taught, held = pieces.tensor_split([evaluated * (len(pieces) // max(1, len(others)))])
    return tokens, torch.cat([_shuffled(taught, generator), held]), len(held)


def _shuffled(sequences: Tensor, generator: torch.Generator) -> Tensor:
    return sequences[torch.randperm(len(sequences), generator=generator).to(sequences.device)]


def shorter(tokens: Tensor, length: int, leading: Sequence[int]) -> Tensor:
    """The same text in sequences of at most `length` tokens, nearly equal ones: (sequences, tokens) ids.

    leading: ids that every sequence begins with, if the given ones do. At most a few tokens of each are left out.
    """
    head = torch.tensor(list(leading), dtype=tokens.dtype, device=tokens.device)
    if not (tokens[:, : len(head)] == head).all():
        head = head[:0]
    width = tokens.shape[1] - len(head)
    if tokens.shape[1] <= length or length <= len(head):
        return tokens
    count = -(-width // (length - len(head)))
    size = width // count
    body = tokens[:, len(head) :][:, : count * size].reshape(-1, size)
    return torch.cat([head.expand(len(body), -1), body], dim=1)
