"""One walk shows several observers the same as a walk for each of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests import families

from saap.baselines.activations import ActivationStatistics
from saap.discovery import discover
from saap.estimation.token_fisher import TokenFisher
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observer
from saap.models.walk.spill import Spill
from saap.models.walk.walk import walk
from saap.structure_search.second_order import WeightedGrams

TOKENS = families.token_ids(5, 10)


def walked(backend: Backend, *observers: Observer) -> None:
    walk(backend, TOKENS, observers, micro_batch=2)


@pytest.mark.parametrize("spilled", [False, True])
@torch.no_grad()
def test_several_observers_listen_in_one_walk(spilled: bool, tmp_path: Path) -> None:
    model = families.build("llama")
    backend = Backend(model, discover(model), spill=Spill(tmp_path) if spilled else None)
    fisher, grams = TokenFisher(backend, backend.graph.groups), WeightedGrams(backend, TOKENS)
    walked(backend, fisher, grams)
    alone = TokenFisher(backend, backend.graph.groups), WeightedGrams(backend, TOKENS)
    for one in alone:
        walked(backend, one)
    for name, scores in alone[0].result()[1].items():
        assert np.array_equal(fisher.result()[1][name].element, scores.element)
    found, expected = grams.result(), alone[1].result()
    for name, order in expected.orders.items():
        assert np.array_equal(found.orders[name], order)
        assert np.array_equal(found.scores[name], expected.scores[name])
    assert bool(expected.grams) is not spilled


@pytest.mark.parametrize("spilled", [False, True])
def test_progress_is_in_samples_or_in_blocks(spilled: bool, tmp_path: Path) -> None:
    model, seen = families.build("llama"), []
    spill = Spill(tmp_path) if spilled else None
    backend = Backend(model, discover(model), spill=spill, progress=lambda *step: seen.append(step))
    walk(backend, TOKENS, [ActivationStatistics(backend.graph)], micro_batch=2, backward=False)
    blocks = len(backend.graph.blocks)
    assert seen == ([(one + 1, blocks) for one in range(blocks)] if spilled else [(2, 5), (4, 5), (5, 5)])
