from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.pipeline import tiny

import saap
from saap.models.loading import memory
from saap.models.loading.devices import (
    PRIMITIVE_CACHE_CAPACITY,
    computable,
    multiplied_in,
    quick_float32_products,
    quick_products,
)

CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.mark.parametrize("capable", ["avx512_bf16", "amx_bf16", ""])
def test_products_are_rounded_where_the_processor_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, capable: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capable: True})
    left, right = torch.rand(64, 64), torch.rand(64, 64)
    for device, rounded in (("cpu", bool(capable)), ("meta", False)):
        with multiplied_in(quick_products(torch.device(device)), torch.device(device)):
            product = left @ right
        assert (product.dtype == torch.bfloat16) == rounded
        torch.testing.assert_close(product.double(), left.double() @ right.double(), rtol=2e-2, atol=0)
    assert (quick_products(torch.device("cpu")) is not None) == bool(capable)
    assert quick_products(torch.device("cpu"), torch.float32) is None
    assert quick_products(torch.device("meta")) is None


def test_quick_products_are_exact_and_their_cache_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_float32_matmul_precision()
    left, right = torch.rand(64, 64), torch.rand(64, 64)
    for given, expected in ((None, PRIMITIVE_CACHE_CAPACITY), ("7", "7")):
        monkeypatch.delenv(CACHE, raising=False)
        if given is not None:
            monkeypatch.setenv(CACHE, given)
        with quick_float32_products():
            assert os.environ[CACHE] == expected
            torch.testing.assert_close(left @ right, (left.double() @ right.double()).float())
        assert torch.get_float32_matmul_precision() == before


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


def test_free_memory_is_without_what_the_tensors_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 24))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    assert memory.free(torch.device("cuda")) == 13
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 20)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 6)
    assert memory.free(torch.device("mps")) == 14
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=7))
    assert memory.free(torch.device("cpu")) == 7
