"""GGUF of type Q4_1 from the packed integers of a tuned folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tests.command import run
from tests.export.gguf_models import adaptive_folder, family_folder

from saap.core.errors import ModelError
from saap.export.gguf.write import interleaved
from saap.models.checkpoint.groupwise import linears_inside, read_packed, write_packed
from saap.models.loading.pretrained import load
from saap.pipeline.export.run import export_gguf
from saap.recovery.quantise import quantise

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
SIZES["num_key_value_heads"] = 2


def tuned(folder: Path, *, bits: int = 4, group_size: int = 32) -> Path:
    """Give a folder the packed weights, and the plain ones that they stand for, as recovery writes them."""
    model = load(folder, device="cpu")
    blocks = [f"model.layers.{layer}" for layer in range(model.config.num_hidden_layers)]
    packed = {}
    for path in linears_inside(model, blocks):
        weight = model.get_submodule(path).weight
        packed[path] = quantise(weight.detach(), group_size=group_size, bits=bits)
        weight.data.copy_(packed[path].dequantised())
    model.save_pretrained(folder)
    (folder / "saap").mkdir(exist_ok=True)
    write_packed(folder / "saap" / "packed.safetensors", packed)
    return folder


@pytest.fixture(params=["adaptive", "stock"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "stock":
        return tuned(family_folder(tmp_path / "model", "qwen2", **SIZES))
    kept: dict[str, Any] = {"ffn": {1: tuple(range(32))}, "attention": {0: (1,), 2: ()}}
    return tuned(adaptive_folder(tmp_path, "llama", **kept, **SIZES))


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def test_the_file_has_the_very_integers(folder: Path, tmp_path: Path) -> None:
    done = export_gguf(folder, tmp_path / "out.gguf", quantization="q4_1")
    packed = read_packed(folder)
    assert done.packed_matrices == len(packed)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(done.path).tensors}
    for path, weight in packed.items():
        layer, module = path.removeprefix("model.layers.").split(".", 1)
        tensor = stored[f"blk.{layer}.{NAMES[module]}.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1
        rounded = replace(weight, zero=weight.zero.half().float())
        expected, found = rounded.dequantised().numpy(), gguf.dequantize(tensor.data, tensor.tensor_type)
        if done.architecture == "deci" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            expected = interleaved(expected, SIZES["head_dim"])
        np.testing.assert_array_equal(found, expected)
        assert (
            float((rounded.dequantised() - weight.dequantised()).abs().max()) < 2e-3
        )  # half a step of a float16 below 2
    assert stored["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert done.agreement is not None
    assert done.agreement.share > 0.8


def test_other_groups_are_quantised_anew_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tuned(family_folder(tmp_path / "model", "llama", **SIZES), bits=3, group_size=16)
    arguments = ["export", folder, "--out", tmp_path / "out.gguf", "--quantization", "q4_1"]
    code, said, _ = run(capsys, *arguments)
    assert (code, "3 bits in groups of 16, which is not Q4_1" in said) == (0, True)
    _, said, _ = run(capsys, *arguments, "--overwrite", "--json", "--no-verify")
    assert json.loads(said)["packed_matrices"] == 0


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = tuned(family_folder(tmp_path / "model", "llama", **SIZES))
    file = folder / "saap" / "packed.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"packed\.safetensors is damaged"):
        export_gguf(folder, tmp_path / "out.gguf", quantization="q4_1")
    assert export_gguf(folder, tmp_path / "other.gguf", quantization="f16", verify=False).packed_matrices == 0


def test_rows_are_read_in_parts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"quantization": "q4_1", "verify": False}
    whole = export_gguf(folder, tmp_path / "whole.gguf", **options).path.read_bytes()
    monkeypatch.setattr("saap.export.gguf.write.CHUNK_VALUES", 1000)
    assert export_gguf(folder, tmp_path / "parts.gguf", **options).path.read_bytes() == whole
