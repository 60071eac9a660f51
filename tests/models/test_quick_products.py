from __future__ import annotations

import pytest
import torch

from saap.models.loading.devices import quick_products


@pytest.mark.parametrize(
    ("device", "written", "instructions", "expected"),
    [
        ("cpu", torch.bfloat16, {"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ("cpu", torch.float16, {"amx_bf16": True}, torch.bfloat16),
        ("cpu", torch.bfloat16, {"avx2": True}, None),
        ("cpu", torch.float32, {"avx512_bf16": True}, None),
        ("cuda", torch.bfloat16, {"avx512_bf16": True}, None),
    ],
)
def test_the_processor_and_what_is_written_decide(
    device: str, written: torch.dtype, instructions: dict[str, bool], expected: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert quick_products(torch.device(device), written) is expected


def test_a_torch_that_does_not_tell_rounds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert quick_products(torch.device("cpu"), torch.bfloat16) is None
