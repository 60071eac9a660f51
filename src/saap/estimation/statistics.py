"""Streaming statistics of two scores over samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from saap.core.records import FloatArray, GroupScores


@dataclass(frozen=True, slots=True)
class Moments:
    """Means, sums of squared deviations and the sum of the product of both deviations over `samples` samples.

    All arrays (units,), float64.
    """

    samples: int
    vector: FloatArray
    vector_m2: FloatArray
    element: FloatArray
    element_m2: FloatArray
    comoment: FloatArray

    @classmethod
    def of(cls, vector: FloatArray, element: FloatArray) -> Moments:
        """Moments of a single sample."""
        zero = np.zeros_like(vector)
        return cls(1, vector, zero, element, zero, zero)

    def scores(self) -> GroupScores:
        """The record of these moments."""
        return GroupScores(
            vector=self.vector,
            vector_m2=self.vector_m2,
            element=self.element,
            element_m2=self.element_m2,
            comoment=self.comoment,
        )


def merge(first: Moments, second: Moments) -> Moments:
    """Moments of both sets of samples together; with a single sample as the second this is Welford's update.

    Source: Chan, Golub and LeVeque 1983, and the same for the product of two deviations.
    """
    samples = first.samples + second.samples
    share = second.samples / samples
    weight = first.samples * share
    vector = second.vector - first.vector
    element = second.element - first.element
    return Moments(
        samples,
        first.vector + vector * share,
        first.vector_m2 + second.vector_m2 + vector * vector * weight,
        first.element + element * share,
        first.element_m2 + second.element_m2 + element * element * weight,
        first.comoment + second.comoment + vector * element * weight,
    )
