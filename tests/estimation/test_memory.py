"""Estimation holds no tensor longer than it needs it."""

from __future__ import annotations

import gc

import torch
from tests import families
from tests.pipeline import tiny

import saap


def tensors() -> int:
    gc.collect()
    return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())


def test_a_walk_leaves_no_tensor_behind() -> None:
    model, ids = tiny.model(), families.token_ids(6, 12).numpy()
    graph = saap.discover(model)
    saap.estimate(model, graph, ids)
    before = tensors()
    saap.estimate(model, graph, ids)
    assert tensors() == before
