from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saap.core.errors import GroupSizeError, ModelError
from saap.models.checkpoint import groupwise
from saap.models.checkpoint.groupwise import (
    GroupwiseLinear,
    groupwise_product,
    pack,
    pooled,
    q4_1_blocks,
    read_packed,
    unpack,
    write_packed,
)
from saap.recovery.adapter import AdaptedLinear
from saap.recovery.quantise import check_group_sizes, quantise, quantise_with_feedback
from saap.settings.recover import LEGAL_BITS, LEGAL_GROUP_SIZES

gguf = pytest.importorskip("gguf")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(LEGAL_BITS), size=st.sampled_from(LEGAL_GROUP_SIZES),
    outputs=st.integers(1, 5), groups=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_packing_is_lossless_and_dense(bits: int, size: int, outputs: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (outputs, groups, size), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (outputs, groups, size * bits // 8)
    assert torch.equal(unpack(packed, bits, size), codes)


@pytest.mark.parametrize("bits", LEGAL_BITS)
@pytest.mark.parametrize("size", LEGAL_GROUP_SIZES)
def test_quantisation_beats_the_plain_range(bits: int, size: int) -> None:
    weight = random(12, 256)
    found = quantise(weight, group_size=size, bits=bits)
    grouped = weight.unflatten(1, (-1, size))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    plain = ((grouped - low) / step).round() * step + low
    assert (found.dequantised() - weight).norm() < (plain - grouped).norm()
    assert found.codes().max() <= 2**bits - 1
    assert found.scale.dtype == torch.float16


@pytest.mark.parametrize("bits", LEGAL_BITS)
def test_a_weight_on_the_grid_comes_back_exactly(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**bits, (6, 4, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    scale = torch.rand(6, 4, 1, generator=generator).half().float() + 2**-8
    scale = scale.half().float()
    weight = (codes * scale - scale * 2).flatten(1)
    found = quantise(weight, group_size=32, bits=bits)
    torch.testing.assert_close(found.dequantised(), weight, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.codes(), codes.flatten(1).to(torch.uint8))


def test_constant_groups_and_values_that_are_not_finite() -> None:
    constant = torch.full((3, 32), 0.25)
    assert torch.equal(quantise(constant, group_size=32, bits=4).dequantised(), constant)
    constant[1, 3] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        quantise(constant, group_size=32, bits=4)


def test_weights_beyond_the_scales_of_float16_are_refused() -> None:
    with pytest.raises(ModelError, match="too large"):
        quantise(torch.tensor([[2e6, -1e6] * 16]), group_size=32, bits=4)


@pytest.mark.parametrize("bits", LEGAL_BITS)
def test_forward_and_backward_equal_a_full_matrix(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groupwise, "VALUES_AT_ONCE", 3 * 64)  # 3 rows at a time, the last chunk shorter
    weight = quantise(random(11, 64), group_size=16, bits=bits)
    full = weight.dequantised(torch.float64)
    inputs = random(2, 5, 64, seed=1).double().requires_grad_(True)
    plain = inputs.detach().clone().requires_grad_(True)
    gradient = random(2, 5, 11, seed=2).double()
    groupwise_product(inputs, weight).backward(gradient)
    (plain @ full.T).backward(gradient)
    torch.testing.assert_close(groupwise_product(inputs, weight), plain @ full.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inputs.grad, plain.grad, rtol=1e-12, atol=1e-12)


def test_the_backward_pass_multiplies_in_the_type_of_the_forward_pass() -> None:
    weight = quantise(torch.full((8, 32), 1 + 2**-10), group_size=16, bits=4)  # 1 in bfloat16
    inputs = torch.ones(2, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = groupwise_product(inputs, weight)
    outputs.backward(torch.ones(2, 8))
    assert torch.equal(inputs.grad, torch.full((2, 32), 8.0))


def test_no_full_matrix_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groupwise, "VALUES_AT_ONCE", 2048)
    weight = quantise(random(512, 128), group_size=32, bits=4)
    inputs = random(1, 128).requires_grad_(True)
    sizes: list[int] = []
    stock = groupwise._row_chunks

    def watched(*arguments: object) -> object:
        for rows, values in stock(*arguments):
            sizes.append(values.numel())
            yield rows, values

    monkeypatch.setattr(groupwise, "_row_chunks", watched)
    groupwise_product(inputs, weight).sum().backward()
    assert len(sizes) == 64
    assert max(sizes) <= 2048


@pytest.mark.parametrize("size", LEGAL_GROUP_SIZES)
def test_merging_the_adapter_changes_nothing(size: int) -> None:
    bias = nn.Parameter(random(24).double())
    generator = torch.Generator().manual_seed(0)
    plain = GroupwiseLinear(quantise(random(24, 256), group_size=size, bits=4), bias)
    layer = AdaptedLinear(plain, rank=4, alpha=8, generator=generator)
    layer.double()
    layer.zero = layer.zero.double()
    layer.second.data = random(24, 4, seed=3).double()
    inputs = random(3, 256, seed=4).double()
    merged = layer.merged()
    assert type(merged) is GroupwiseLinear
    assert not list(merged.named_parameters())[1:]
    with torch.no_grad():
        before, after = layer(inputs), merged(inputs)
        without = GroupwiseLinear(layer.quantised, bias)(inputs)
    assert float((before - after).abs().max()) <= 1e-10
    assert float((before - without).abs().max()) > 0.1


def test_the_adapter_learns_the_gradient_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = GroupwiseLinear(quantise(random(6, 64), group_size=16, bits=4))
    layer = AdaptedLinear(plain, rank=2, alpha=4, generator=generator)
    layer.double()
    layer.second.data = random(6, 2, seed=3).double()
    inputs = random(5, 64, seed=4).double().requires_grad_(True)
    weight = layer.quantised.dequantised(torch.float64)
    expected = inputs @ weight.T + 2 * pooled(inputs, 16) @ layer.first.T @ layer.second.T
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda *_: layer(inputs), (inputs, layer.first, layer.second))


@pytest.mark.parametrize("bits", LEGAL_BITS)
def test_scales_learn_the_gradient_of_their_formula_and_merge_exactly(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groupwise, "VALUES_AT_ONCE", 3 * 64)
    plain = GroupwiseLinear(quantise(random(11, 64), group_size=16, bits=bits))
    layer = AdaptedLinear(plain, rank=2, alpha=4, generator=torch.Generator().manual_seed(0), scales=True)
    layer.double()
    layer.zero = layer.zero.double()
    assert layer.scale_delta is not None
    layer.scale_delta.data = random(11, 4, seed=5).double() * 0.2
    layer.second.data = random(11, 2, seed=3).double()
    inputs, gradient = random(2, 5, 64, seed=4).double(), random(2, 5, 11, seed=2).double()
    outputs = layer(inputs)
    outputs.backward(gradient)
    rounded = (plain.scale.double() * (1 + layer.scale_delta.detach())).half()
    straight_through = plain.scale.double() * (layer.scale_delta - layer.scale_delta.detach())
    scale = (rounded.double() + straight_through).unsqueeze(-1)
    found = layer.scale_delta.grad
    layer.scale_delta.grad = None
    codes = plain.quantised.codes().unflatten(1, (-1, 16)).double()
    zero = plain.zero.double() + 2 * layer.second.detach() @ layer.first.detach()
    expected = inputs @ (codes * scale + zero.unsqueeze(-1)).flatten(1).T
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
    expected.backward(gradient)
    torch.testing.assert_close(found, layer.scale_delta.grad, rtol=1e-8, atol=1e-8)
    merged = layer.merged()
    assert type(merged) is GroupwiseLinear
    assert torch.equal(merged.scale, rounded)
    assert torch.equal(merged.packed, plain.packed)
    assert not list(merged.parameters())
    with torch.no_grad():
        assert float((merged(inputs) - outputs).abs().max()) <= 1e-10


def test_rounding_the_model_keeps_scales_and_zero_points() -> None:
    weight = quantise(random(8, 32), group_size=32, bits=4)
    layer = GroupwiseLinear(weight, nn.Parameter(random(8))).to(torch.bfloat16)
    assert layer.scale.dtype == torch.float16
    assert layer.zero.dtype == torch.float32
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16


def test_error_feedback_lowers_the_error_of_the_outputs() -> None:
    mixing = random(64, 64, seed=5) + 0.5
    inputs = random(400, 64, seed=6) @ mixing
    weight = random(20, 64)
    gram = inputs.T @ inputs

    def error(found: Tensor) -> float:
        return float(((found - weight) @ inputs.T).norm())

    plain = quantise(weight, group_size=16, bits=3)
    fed_back = quantise_with_feedback(weight, gram, group_size=16, bits=3)
    assert error(fed_back.dequantised()) < 0.8 * error(plain.dequantised())


def test_refusal_names_every_matrix_and_the_sizes_that_fit() -> None:
    inputs = {"a.up": 64, "a.down": 112, "b.down": 80}
    with pytest.raises(GroupSizeError, match=r"2 matrices .* 32 .*a\.down \(112\), b\.down \(80\).*--group-size 16"):
        check_group_sizes(inputs, 32)
    with pytest.raises(GroupSizeError, match=r"Prune with --align 32$|Prune with --align 32\."):
        check_group_sizes({"a": 40}, 32)
    check_group_sizes(inputs, 16)


def test_packed_file_comes_back(tmp_path: Path) -> None:
    weights = {
        "a.b": quantise(random(4, 64), group_size=32, bits=3),
        "c": quantise(random(2, 32), group_size=16, bits=8),
    }
    write_packed(tmp_path / "saap" / "packed.safetensors", weights)  # type: ignore[operator]
    found = read_packed(tmp_path)  # type: ignore[arg-type]
    assert list(found) == ["a.b", "c"]
    for name, weight in weights.items():
        assert torch.equal(found[name].dequantised(), weight.dequantised())
    with pytest.raises(ModelError, match="no packed weights"):
        read_packed(tmp_path / "saap")


def test_q4_1_blocks_are_what_gguf_reads() -> None:
    weight = quantise(random(6, 128) * 0.02, group_size=32, bits=4)
    blocks = q4_1_blocks(weight).numpy()
    read = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1))
    expected = replace(weight, zero=weight.zero.half().float()).dequantised()
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-7)


def test_inputs_that_are_not_finite_are_an_error() -> None:
    gram = torch.eye(32)
    gram[3, 4] = torch.nan
    with pytest.raises(ModelError, match="input of a linear layer is not finite"):
        quantise_with_feedback(torch.randn(4, 32), gram, group_size=16, bits=4)
