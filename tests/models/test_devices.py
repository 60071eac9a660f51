from __future__ import annotations

import pytest
import torch

from saap.models.devices import rounded_products


def test_products_are_rounded_for_a_while_only() -> None:
    before = torch.get_float32_matmul_precision()
    with rounded_products():
        assert torch.get_float32_matmul_precision() == "medium"
        left, right = torch.rand(64, 64), torch.rand(64, 64)
        torch.testing.assert_close(left @ right, (left.double() @ right.double()).float(), rtol=2e-2, atol=0)
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ValueError, match="stop"), rounded_products():
        raise ValueError("stop")
    assert torch.get_float32_matmul_precision() == before
