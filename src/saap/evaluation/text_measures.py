"""Measures of generated token sequences: pure functions of ids."""

from __future__ import annotations

from collections.abc import Sequence

Sequences = Sequence[Sequence[int]]


def _ngrams(sequence: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(sequence[start : start + n]) for start in range(len(sequence) - n + 1)]


def distinct(sequences: Sequences, n: int) -> float:
    """Distinct n-grams over all n-grams of all sequences together, 0 without any (Li et al. 2016)."""
    found = [gram for sequence in sequences for gram in _ngrams(sequence, n)]
    return len(set(found)) / len(found) if found else 0.0


def repetition(sequences: Sequences, n: int = 4) -> float:
    """Mean over the sequences of 1 - distinct n-grams / n-grams of the sequence (seq-rep-n, Welleck et al. 2020).

    Sequences shorter than n tokens do not count; 0 without any longer one.
    """
    shares = [1 - len(set(grams)) / len(grams) for sequence in sequences if (grams := _ngrams(sequence, n))]
    return sum(shares) / len(shares) if shares else 0.0


def agreement(first: Sequence[int], second: Sequence[int]) -> float:
    """Share of positions at which two sequences of one length hold the same token. Raises ValueError."""
    if len(first) != len(second) or not first:
        raise ValueError(f"sequences of {len(first)} and {len(second)} tokens")
    return sum(one == other for one, other in zip(first, second, strict=True)) / len(first)


def parts(sequence: Sequence[int], count: int) -> list[Sequence[int]]:
    """`sequence` cut into `count` parts of equal length; what is left over at the end goes."""
    length = len(sequence) // count
    return [sequence[index * length : (index + 1) * length] for index in range(count)]
