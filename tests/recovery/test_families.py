"""Every family: its layers can be packed, adapted and merged without a line of code for it."""

from __future__ import annotations

import pytest
import torch
from tests.families import EVERY, FLOAT32, token_ids
from tests.recovery.tiny import blocks, build

from saap.models.checkpoint.groupwise import GroupwiseLinear, linears_inside, pack_linear
from saap.models.structure.linear import weight_out_in
from saap.recovery.adapter import adapt, merge
from saap.recovery.quantise import quantise


@pytest.mark.parametrize("family", EVERY)
def test_merged_equals_with_adapter(family: str) -> None:
    model = build(family)
    paths = linears_inside(model, blocks(model))
    ids = token_ids()
    with torch.no_grad():
        dense = model(ids).logits
        for path in paths:
            weight = quantise(weight_out_in(model.get_submodule(path)), group_size=16, bits=8)
            pack_linear(model, path, weight, torch.device("cpu"))
        packed = model(ids).logits
        assert float((packed - dense).abs().max() / dense.abs().max()) < 0.05
        parameters = adapt(model, rank=2, alpha=4, seed=0, scales=True)
        assert len(parameters) == 3 * len(paths)
        torch.testing.assert_close(model(ids).logits, packed, rtol=0, atol=0)  # B is zero at first
        generator = torch.Generator().manual_seed(1)
        for module in model.modules():
            if isinstance(module, GroupwiseLinear):
                module.double()
                module.zero = module.zero.double()
        for name, value in parameters.items():
            if not name.endswith("first"):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
        adapted = model(ids).logits
        assert len(merge(model)) == len(paths)
        merged = model(ids).logits
    assert float((adapted - packed).abs().max()) > 1e-3
    tolerance = 1e-5 if family in FLOAT32 else 1e-10
    assert float((adapted - merged).abs().max() / adapted.abs().max()) <= tolerance
