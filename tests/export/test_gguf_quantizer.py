"""Types that llama.cpp's own quantiser makes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.command import run
from tests.export.gguf_models import adaptive_folder, family_folder, family_model

from saap.core.errors import ConfigurationError, ExportError, ModelError
from saap.data.samples import calibration_set
from saap.export.gguf import quantize, write
from saap.export.gguf.plan import GgufPlan
from saap.export.gguf.quantize import importance_matrix
from saap.export.source import open_source
from saap.models.checkpoint.gguf_files import bytes_per_token
from saap.models.loading.llama_cpp import quantize_file
from saap.pipeline.export.run import export_gguf
from saap.pipeline.runtimes.llama_cpp import LlamaCppRuntime
from saap.settings.evaluate import SpeedSettings
from saap.settings.export import ExportRequest, GgufType
from saap.settings.recipe import recipe_from
from saap.settings.registry import RuntimeName

SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_attention_heads": 8}
SIZES["num_key_value_heads"] = 8
MIXES = [kind for kind in GgufType if kind.made_by_llama_cpp]


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "SAMPLES", 2)
    monkeypatch.setattr(quantize, "LENGTH", 32)


@pytest.mark.parametrize("kind", MIXES)
def test_the_quantiser_of_llama_cpp_writes_the_file(tmp_path: Path, kind: GgufType) -> None:
    folder = family_folder(tmp_path / "model", "llama", **SIZES)
    done = export_gguf(folder, tmp_path / "out.gguf", quantization=kind)
    reader = gguf.GGUFReader(done.path)
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
    stored = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert stored["blk.1.ffn_gate.weight"] == kind.upper().removesuffix("_M")
    assert done.imatrix
    assert done.fallbacks is not None
    assert (done.fallbacks.types, done.fallbacks.extra_bytes) == ({}, 0)
    assert done.agreement is not None
    assert done.perplexity_over_f16 is not None
    assert 0.7 < done.perplexity_over_f16 < 1.4  # of random weights
    assert done.agreement.perplexity_ratio == pytest.approx(done.perplexity_over_f16, abs=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.Modelfile", "out.gguf"]


def test_the_quantiser_keeps_the_scales_of_layers_that_differ(tmp_path: Path) -> None:
    sizes = {**SIZES, "query_pre_attn_scalar": 32}
    folder = adaptive_folder(tmp_path, "gemma3", ffn={0: tuple(range(256))}, attention={}, **sizes)
    done = export_gguf(folder, tmp_path / "out.gguf", quantization="q4_k_m")
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(done.path).tensors}
    assert stored["blk.0.attn_v.scale"] == stored["blk.1.attn_output.scale"] == "F32"
    assert (done.architecture, stored["blk.0.ffn_gate.weight"]) == ("gemma4", "Q4_K")
    assert done.perplexity_over_f16 is not None
    assert 0.7 < done.perplexity_over_f16 < 1.4


def test_rows_that_the_blocks_do_not_fit_are_said_with_their_bytes(tmp_path: Path) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={1: tuple(range(288))}, attention={}, **SIZES)
    done = export_gguf(folder, tmp_path / "out.gguf", quantization="q6_k", verify=False)
    found = done.fallbacks
    assert found is not None
    assert found.types == {"q8_0": 1}
    assert found.modules == {"ffn_down": (288,)}
    weights = 288 * 256
    assert found.extra_bytes == weights * 34 // 32 - weights * 210 // 256
    (note,) = [line for line in done.notes if "does not divide" in line]
    assert "ffn_down (288)" in note
    assert "1 as q8_0" in note
    assert "--align 256" in note


def test_rows_that_no_blocks_fit_stay_in_16_bits(tmp_path: Path) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={1: tuple(range(40))}, attention={}, **SIZES)
    done = export_gguf(folder, tmp_path / "out.gguf", quantization="q4_k_m", verify=False)
    assert done.fallbacks is not None
    assert done.fallbacks.types == {"f16": 1}
    assert done.fallbacks.extra_bytes == 40 * 256 * 2 - 40 * 256 * 144 // 256


@pytest.mark.parametrize(("name", "inputs"), [("llama", "attn_q"), ("qwen3", "attn_qkv")])
def test_the_importance_matrix_has_mean_squares_of_inputs(tmp_path: Path, name: str, inputs: str) -> None:
    folder = adaptive_folder(
        tmp_path, name, ffn={1: tuple(range(256))}, attention={}, **SIZES, tie_word_embeddings=True
    )
    source = open_source(folder)
    plan, model = GgufPlan(source.config, source.tensors.shapes, GgufType.Q4_K_M), source.model()
    found = importance_matrix(model, source.tokenizer, plan.tensors, context=64)
    assert found.keys() == {
        tensor.name for tensor in plan.tensors if tensor.name.startswith("blk") and tensor.shape[1:]
    }
    samples = calibration_set("mixed", source.tokenizer, samples=2, length=32, seed=0)
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(torch.as_tensor(samples.tokens)))
    expected = hidden.square().mean((0, 1)).numpy()
    np.testing.assert_allclose(found[f"blk.0.{inputs}.weight"], expected, rtol=1e-4)


def test_the_importance_matrix_decides_where_errors_are(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", "llama", **SIZES)
    first = export_gguf(folder, tmp_path / "first.gguf", verify=False).path
    weight = family_model("llama", **SIZES).model.layers[1].mlp.down_proj.weight.detach().numpy()
    importance = np.full(512, 1e-3, dtype=np.float32)
    importance[::2] = 1.0
    errors = []
    for name, given in (("plain", {}), ("weighed", {"blk.1.ffn_down.weight": importance})):
        out = tmp_path / f"{name}.gguf"
        quantize_file(first, out, int(gguf.LlamaFileType.MOSTLY_Q4_K_S), importance=given)
        (tensor,) = [one for one in gguf.GGUFReader(out).tensors if one.name == "blk.1.ffn_down.weight"]
        difference = gguf.dequantize(tensor.data, tensor.tensor_type) - weight
        errors.append(float(np.square(difference[:, ::2]).sum()))
    assert errors[1] < 0.95 * errors[0]


def test_nothing_is_left_of_a_failed_quantisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = family_folder(tmp_path / "model", "llama", **SIZES)
    out = tmp_path / "out.gguf"
    out.write_text("mine")

    def fails(first: Path, part: Path, *_: Any) -> None:
        assert first.is_file()
        part.write_text("half")
        raise ModelError("llama.cpp cannot", "Do something")

    monkeypatch.setattr(write, "quantize", fails)
    with pytest.raises(ModelError, match=r"llama\.cpp cannot"):
        export_gguf(folder, out, quantization="q4_k_m", verify=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf"]
    assert out.read_text() == "mine"


def test_what_llama_cpp_cannot_read_is_said(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(ModelError, match=r"llama\.cpp cannot quantise .*bad\.gguf"):
        quantize_file(bad, tmp_path / "out.gguf", int(gguf.LlamaFileType.MOSTLY_Q6_K), importance={})


def test_an_importance_matrix_for_another_type_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigurationError, match="--imatrix changes nothing of q8_0"):
        ExportRequest(quantization=GgufType.Q8_0, imatrix=True)
    code, _, error = run(capsys, "export", "x", "-o", tmp_path / "o.gguf", "--quantization", "q8_0", "--imatrix")
    assert code == 2
    assert "q4_k_m" in error
    assert ExportRequest(quantization=GgufType.Q8_0, imatrix=False).quantization is GgufType.Q8_0


def test_a_missing_llama_cpp_is_said_before_the_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("llama_cpp") else found(name))
    with pytest.raises(ExportError, match=r"The type q4_k_m needs the package llama-cpp-py-sync"):
        export_gguf(tmp_path / "missing", tmp_path / "out.gguf", quantization="q4_k_m", verify=False)


@pytest.mark.parametrize(
    ("kind", "given", "align"), [("q4_k_m", {}, 256), ("q4_k_m", {"align": 64}, 64), ("f16", {}, 32)]
)
def test_a_recipe_prunes_for_the_blocks_of_its_exports(kind: str, given: dict[str, int], align: int) -> None:
    tree = {
        "model": "m", "output_dir": "o", "prune": {"pruning_ratio": 0.2, **given},
        "export": {"small.gguf": {"format": "gguf", "quantization": kind}},
    }  # fmt: skip
    recipe = recipe_from(tree, "a recipe")
    assert recipe.prune is not None
    assert recipe.prune.align == align


def test_the_speed_is_measured_in_these_types_too(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", "llama", **SIZES)
    settings = SpeedSettings(runtime=RuntimeName.LLAMA_CPP, gguf_type=GgufType.Q4_K_M, prompt_tokens=4, new_tokens=2)
    written = export_gguf(folder, tmp_path / "out.gguf", quantization="q4_k_m", imatrix=False, verify=False).path
    with LlamaCppRuntime.opened(folder, settings) as runtime:
        assert 0 <= runtime.read([3, 4]) < runtime.vocabulary
        assert runtime.bytes_per_token == bytes_per_token(written) < written.stat().st_size
