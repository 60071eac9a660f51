"""Streaming statistics of two scores over samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from saap.core.records import FloatArray, GroupScores


@dataclass(frozen=True, slots=True)
class Moments:
    """Statistics over `samples` samples of a group's units."""

    samples: int
    scores: GroupScores

    @classmethod
    def of(cls, vector: FloatArray, element: FloatArray) -> Moments:
        """Moments of a single sample."""
        zero = np.zeros_like(vector)
        return cls(1, GroupScores(vector=vector, vector_m2=zero, element=element, element_m2=zero, comoment=zero))


def merge(one: Moments, other: Moments) -> Moments:
    """Moments of both sets of samples together; with a single sample as the second this is Welford's update.

    Source: Chan, Golub and LeVeque 1983, and the same for the product of two deviations.
    """
    first, second = one.scores, other.scores
    samples = one.samples + other.samples
    share = other.samples / samples
    weight = one.samples * share
    vector, element = second.vector - first.vector, second.element - first.element
    scores = GroupScores(
        vector=first.vector + vector * share,
        vector_m2=first.vector_m2 + second.vector_m2 + vector * vector * weight,
        element=first.element + element * share,
        element_m2=first.element_m2 + second.element_m2 + element * element * weight,
        comoment=first.comoment + second.comoment + vector * element * weight,
    )
    return Moments(samples, scores)
