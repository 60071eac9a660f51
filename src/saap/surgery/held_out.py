"""How the sequences of a reconstruction are used: a few at a time, and some of them only to choose the ridge."""

from saap.core.errors import CalibrationError

HELD_OUT_SHARE = 0.125
HELD_OUT_AT_LEAST = 4
"""Sequences that choose the ridge, where there are twice as many: the held-out error of fewer is too noisy."""
MICRO_BATCH = 4
"""Sequences at a time."""


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
