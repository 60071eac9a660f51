from __future__ import annotations

import pytest
import torch

from saap.models.devices import rounded_products


def test_products_of_the_cpu_alone_are_rounded_and_only_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_float32_matmul_precision()
    with rounded_products(torch.device("meta")):
        assert torch.get_float32_matmul_precision() == before
    with rounded_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "medium"
        left, right = torch.rand(64, 64), torch.rand(64, 64)
        torch.testing.assert_close(left @ right, (left.double() @ right.double()).float(), rtol=2e-2, atol=0)
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ValueError, match="stop"), rounded_products(torch.device("cpu")):
        raise ValueError("stop")
    assert torch.get_float32_matmul_precision() == before
