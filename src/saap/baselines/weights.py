"""Data-free baselines: random scores and weight magnitude."""

import numpy as np

from saap.baselines.baseline import Baseline, along_axis, score_units
from saap.core.records import FloatArray, Role
from saap.models.loading.precision import widened
from saap.models.walk.backend import Backend


def random_scores(backend: Backend, measured: None, seed: int) -> dict[str, FloatArray]:
    """A uniform random number for each unit."""
    generator = np.random.default_rng(seed)
    return {group.name: generator.random(group.units) for group in backend.graph.groups if group.layer >= 0}


def magnitude_scores(backend: Backend, measured: None, seed: int) -> dict[str, FloatArray]:
    """Sum of the squares of a unit's weights over all members.

    Source: Li et al. 2017 (filters by their norm); over coupled groups as in LLM-Pruner (`l2`), Ma et al. 2023.
    """
    return score_units(backend, lambda _, member, weight: along_axis(widened(weight).square(), member.axis))


RANDOM = Baseline(scores=random_scores, scored=frozenset(Role) - {Role.HIDDEN})
MAGNITUDE = Baseline(scores=magnitude_scores)
