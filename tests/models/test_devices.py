from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from tests.pipeline import tiny

import saap
from saap.models.loading.devices import PRIMITIVE_CACHE_CAPACITY, computable, rounded_products

CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def test_products_of_the_cpu_alone_are_rounded_and_only_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(CACHE, raising=False)
    before = torch.get_float32_matmul_precision()
    with rounded_products(torch.device("meta")):
        assert torch.get_float32_matmul_precision() == before
        assert CACHE not in os.environ
    with rounded_products(torch.device("cpu")):
        assert os.environ[CACHE] == PRIMITIVE_CACHE_CAPACITY
        assert torch.get_float32_matmul_precision() == "medium"
        left, right = torch.rand(64, 64), torch.rand(64, 64)
        torch.testing.assert_close(left @ right, (left.double() @ right.double()).float(), rtol=2e-2, atol=0)
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ValueError, match="stop"), rounded_products(torch.device("cpu")):
        raise ValueError("stop")
    assert torch.get_float32_matmul_precision() == before
    monkeypatch.setenv(CACHE, "7")
    with rounded_products(torch.device("cpu")):
        assert os.environ[CACHE] == "7"


def test_a_model_object_in_float16_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("making", "planning"):  # some processors round the products of 16-bit models
        monkeypatch.setattr(f"saap.pipeline.prune.{module}.quick_products", lambda *_: None)
    given = tiny.model().half()
    text = np.random.default_rng(0).integers(2, tiny.VOCABULARY, (32, 64))
    settings = {"pruning_ratio": 0.2, "samples": 4, "sample_length": 16, "refit_tokens": 1024, "align": 8,
                "effort": "fast", "calibration": text}  # fmt: skip
    found = saap.prune(given, **settings)
    expected = saap.prune(tiny.model().half().float(), **settings)
    assert {parameter.dtype for parameter in given.parameters()} == {torch.float16}
    given.model.embed_tokens.float()  # of two types
    assert {parameter.dtype for parameter in computable(given).parameters()} == {torch.float32}
    given.half()
    assert found.plan.keep == expected.plan.keep
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, expected.model.get_parameter(name)), name
    scores = saap.estimate(given, saap.discover(given), text[:4])
    assert all(np.isfinite(group.element).all() and group.element.any() for group in scores.groups.values())
