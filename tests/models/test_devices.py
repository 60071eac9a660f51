from __future__ import annotations

import pytest
import torch

from saap.models.devices import training_products


def test_products_of_the_cpu_alone_are_quickened_and_only_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_float32_matmul_precision()
    with training_products(torch.device("meta")):
        assert torch.get_float32_matmul_precision() == before
    with training_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
