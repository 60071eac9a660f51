"""The estimation: one pass over the calibration samples that scores every unit."""

from __future__ import annotations

from collections.abc import Collection

import torch

from saap.core.errors import CalibrationError
from saap.core.records import CalibrationSet, ImportanceScores, Role
from saap.estimation.members import scored_parts
from saap.estimation.unit_importance import UnitImportance
from saap.models.walk.backend import Backend
from saap.models.walk.walk import walk
from saap.settings.prune import Aggregation, ElementOrder

TOKENS_AT_ONCE = 256
"""Tokens of a micro-batch. More are no faster on a CPU, and each costs the inputs of all blocks in memory."""


def estimate(
    backend: Backend,
    calibration: CalibrationSet,
    *,
    roles: Collection[Role] = (Role.FFN, Role.ATTENTION),
    element_order: ElementOrder = ElementOrder.SECOND,
    aggregation: Aggregation = Aggregation.SUM,
    micro_batch: int | None = None,
) -> ImportanceScores:
    """Vector-wise and element-wise importance of every unit of the groups of `roles`: mean and spread over samples.

    One pass gives both. The importance of each sample is that of its own loss, the mean over its predicted tokens;
    samples are then averaged. Members in linear modules of the decoder blocks are scored, biases with their channels.
    micro_batch: samples at a time, by default as many as fit into 256 tokens; it does not change the result. Where a
    group lies in stacked tensors (experts) it is one sample.
    Raises CalibrationError for less than two samples, NonFiniteLossError, UnsupportedModelError.
    """
    samples, length = calibration.tokens.shape
    if samples < 2:
        raise CalibrationError("Fluctuation over samples needs two of them", "Use --num-samples 2 or more")
    graph = backend.graph
    parts = scored_parts(backend.model, graph, [group for group in graph.groups if group.role in roles])
    one_by_one = bool(parts.stacked or parts.whole)
    rows = 1 if one_by_one else micro_batch or max(1, TOKENS_AT_ONCE // length)
    importance = UnitImportance(backend.model, parts, element_order, aggregation)
    tokens = torch.from_numpy(calibration.tokens).to(backend.device)
    walk(backend, tokens, [importance], micro_batch=rows, ignored=calibration.ignored)
    losses, groups = importance.result()
    return ImportanceScores(
        graph_digest=graph.digest,
        calibration_digest=calibration.digest,
        samples=samples,
        element_order=str(element_order),
        aggregation=str(aggregation),
        losses=losses,
        groups=groups,
    )
