from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.command import run
from tests.data.byte_tokenizer import byte_tokenizer
from tests.export.gguf_models import EMPTY, adaptive_folder, family_folder, family_model, same_in_llama_cpp
from tests.pipeline import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import saap
from saap.core.errors import ConfigurationError, ExportError, ModelError, OutputError, SaapError
from saap.data.texts import evaluation_text
from saap.export.gguf import plan, write
from saap.export.gguf.architectures import ARCHITECTURES, PerLayer
from saap.export.gguf.fields import llama3_factors
from saap.export.gguf.modelfile import chat_template, modelfile
from saap.export.gguf.tokenizer import fields_from_gguf, fields_from_huggingface
from saap.models.checkpoint.gguf_files import read_header
from saap.models.loading.llama_cpp import LlamaCpp
from saap.pipeline.export.run import export_gguf, export_model
from saap.settings.export import ExportRequest, GgufType

ALIGNED = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
ALIGNED["num_key_value_heads"] = 2
DIVISIBLE = {"hidden_size": 96, "intermediate_size": 64, "head_dim": 16}


def least_share(name: str) -> float:
    """Least share of equal predictions: llama.cpp looks GELU up in a float16 table."""
    return 0.99 if "gemma" in name else 1.0


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama", "llama"), ("llama_tied", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"),
        ("gemma", "gemma"), ("gemma2", "gemma2"), ("gemma3", "gemma3"),
    ],
)  # fmt: skip
def test_stock_models_compute_the_same_in_llama_cpp(tmp_path: Path, name: str, architecture: str) -> None:
    done = same_in_llama_cpp(family_folder(tmp_path / "model", name), tmp_path / "out.gguf", least_share(name))
    assert done.architecture == architecture
    assert done.same_tokens


HALF = tuple(range(0, 80, 2))
FULL_FIRST = ["full_attention", *["sliding_attention"] * 6]
SCALED = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
"""Rotary embeddings of a Gemma 3 by kind of layer."""


DIFFERENT = {
    "llama": "deci", "llama_tied": "deci", "mistral": "deci", "qwen2": "deci", "qwen3": "openelm", "gemma": "gemma4",
    "gemma3": "gemma4",
}  # fmt: skip


def tied(name: str) -> dict[str, Any]:
    """llama.cpp's openelm has no output of its own."""
    return {"tie_word_embeddings": True} if DIFFERENT[name] == "openelm" else {}


@pytest.mark.parametrize("name", list(DIFFERENT))
@pytest.mark.parametrize(
    ("ffn", "attention"),
    [
        ({0: HALF, 1: tuple(range(33))}, {1: (0, 2)}),
        ({1: EMPTY}, {}),
        ({1: EMPTY}, {1: (1,)}),
        ({}, {1: EMPTY}),
        ({0: HALF}, {0: EMPTY}),
        ({0: EMPTY}, {1: EMPTY}),
        ({1: EMPTY}, {1: EMPTY}),
    ],
    ids=["sizes", "ffn gone", "ffn gone and one head", "attention gone", "first attention gone", "both", "whole block"],
)
def test_layers_that_differ_compute_the_same_in_llama_cpp(tmp_path: Path, name: str, ffn: Any, attention: Any) -> None:
    folder = adaptive_folder(tmp_path, name, ffn=ffn, attention=attention, **tied(name))
    done = same_in_llama_cpp(folder, tmp_path / "out.gguf", least_share(name))
    assert done.architecture == DIFFERENT[name]


@pytest.mark.parametrize("name", list(DIFFERENT))
def test_in_16_bits_they_have_the_same_next_token_on_2000_tokens(tmp_path: Path, name: str) -> None:
    folder = adaptive_folder(tmp_path, name, ffn={0: HALF, 1: tuple(range(33))}, attention={1: (0, 2)}, **tied(name))
    file = folder / "model.safetensors"  # whose weights need 32 bits, unlike those of published models
    save_file({key: tensor.half().float() for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    request = ExportRequest(quantization=GgufType.F16, check_tokens=2000)
    done = export_model(folder, tmp_path / "out.gguf", request).as_dict()
    assert done["checked_tokens"] == 2000
    assert done["equal_predictions"] >= 0.995
    assert done["perplexity_ratio"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("options", [{"layer_types": FULL_FIRST}, {"query_pre_attn_scalar": 24}], ids=str)
def test_what_gemma3_derives_from_the_depth_gemma4_is_told(tmp_path: Path, options: dict[str, Any]) -> None:
    """As after blocks were dropped: llama.cpp's gemma3 has full attention in every sixth layer, and its own scale."""
    folder = family_folder(tmp_path / "model", "gemma3", num_hidden_layers=7, rope_parameters=SCALED, **options)
    done = same_in_llama_cpp(folder, tmp_path / "out.gguf", least_share("gemma3"))
    assert done.architecture == "gemma4"


def test_windows_of_layers_that_differ_compute_the_same_in_llama_cpp(tmp_path: Path) -> None:
    """The sixth layer has full attention, whose rotary embedding has another base and is scaled."""
    options: dict[str, Any] = {"num_hidden_layers": 7, "rope_parameters": SCALED, "query_pre_attn_scalar": 12}
    folder = adaptive_folder(tmp_path, "gemma3", ffn={0: HALF}, attention={5: (1,), 6: (0, 2)}, **options)
    done = same_in_llama_cpp(folder, tmp_path / "out.gguf", least_share("gemma3"))
    rows = list(range(3, 40))
    with LlamaCpp(done.path, context=64, exact=True) as exact, LlamaCpp(done.path, context=64) as usual:
        # keys and values in float16: those are 2^-10 of the model's, and still keep their precision
        np.testing.assert_allclose(usual.logits(rows), exact.logits(rows), atol=0.02)


def test_the_last_layer_may_lose_its_ffn(tmp_path: Path) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={2: EMPTY}, attention={0: (1,)})
    done = same_in_llama_cpp(folder, tmp_path / "out.gguf")
    with LlamaCpp(done.path, context=64) as runtime:  # a prompt of which only the last position is asked for
        whole = runtime.logits([5, 6, 7, 8])
        np.testing.assert_allclose(runtime.feed([5, 6, 7, 8]), whole[-1:], rtol=1e-4, atol=1e-4)


def test_layers_pruned_alike_are_a_stock_architecture_even_in_the_adaptive_layout(tmp_path: Path) -> None:
    folder = adaptive_folder(tmp_path, "qwen3", ffn=dict.fromkeys(range(2), HALF), attention={})
    assert same_in_llama_cpp(folder, tmp_path / "out.gguf").architecture == "qwen3"


@pytest.mark.parametrize("role", ["ffn", "attention"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_the_own_architecture_reads_the_sizes_of_the_first_layer_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, role: str
) -> None:
    """Where this fails, llama.cpp has learnt it: say so in `architectures.py`."""
    kind = "gemma3_text" if name == "gemma3" else name
    own = ARCHITECTURES[kind]
    tried = replace(own, per_layer=PerLayer(name=own.name, interleaved=own.interleaved, biases=own.biases))
    monkeypatch.setattr(plan, "ARCHITECTURES", {kind: tried})
    kept: dict[str, Any] = {"ffn": {}, "attention": {}, role: {1: HALF if role == "ffn" else (0, 2)}}
    with pytest.raises(ModelError, match=r"check_tensor_dims: tensor 'blk\.1"):
        export_gguf(adaptive_folder(tmp_path, name, **kept), tmp_path / "out.gguf", quantization="f32")


def test_the_table_of_the_documentation_is_of_these_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.syspath_prepend(str(root / "scripts"))
    table = importlib.import_module("gguf_table")
    text = (root / "docs" / "guides" / "export.md").read_text(encoding="utf-8")
    assert table.page(text) == text, "run python scripts/gguf_table.py"


FLAP: dict[str, Any] = {"method": "flap", "samples": 4, "sample_length": 32, "align": 8, "pruning_ratio": 0.2}


@pytest.mark.parametrize("role", ["ffn", "attention"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_added_biases_compute_the_same_in_llama_cpp(tmp_path: Path, name: str, role: str) -> None:
    share = 0.05 if role == "attention" else 0.2
    options = {**FLAP, "pruning_ratio": share, "roles": (role,), "out": tmp_path / "out"}
    model = saap.prune(family_folder(tmp_path / "model", name), **options).model
    added = ("mlp.down_proj.bias", "self_attn.o_proj.bias")
    assert any(key.endswith(added) for key in model.state_dict())
    done = same_in_llama_cpp(tmp_path / "out", tmp_path / "out.gguf")
    assert any("bias" in tensor.name for tensor in gguf.GGUFReader(done.path).tensors)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_every_type_holds_the_weights(tmp_path: Path, kind: str) -> None:
    folder = family_folder(tmp_path / "model", "qwen2", **ALIGNED)
    done = export_gguf(folder, tmp_path / "out.gguf", quantization=kind, verify=False)
    assert done.agreement is None
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(done.path).tensors}
    weight = family_model("qwen2", **ALIGNED).model.layers[1].mlp.down_proj.weight.detach().numpy()
    tensor = stored["blk.1.ffn_down.weight"]
    assert tensor.tensor_type == gguf.GGMLQuantizationType[kind.upper()]
    expected = gguf.dequantize(gguf.quantize(weight, tensor.tensor_type), tensor.tensor_type)
    np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), expected)
    assert stored["blk.1.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    four_bits = kind.startswith("q4")
    assert stored["token_embd.weight"].tensor_type.name == ("Q8_0" if four_bits else kind.upper())
    with LlamaCpp(done.path, context=64) as runtime:
        assert np.isfinite(runtime.logits([3, 4, 5])).all()


def test_rows_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = family_folder(tmp_path / "model", "llama")
    whole = export_gguf(folder, tmp_path / "whole.gguf", verify=False).path.read_bytes()
    monkeypatch.setattr(write, "CHUNK_VALUES", 100)
    assert export_gguf(folder, tmp_path / "parts.gguf", verify=False).path.read_bytes() == whole


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = family_folder(tmp_path / "model", "llama")
    monkeypatch.setattr(write, "interleaved", lambda rows, head_rows: rows)
    with pytest.raises(ExportError, match="not kept"):
        export_gguf(folder, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rotary_pairs_become_neighbours() -> None:
    rows = np.arange(16).reshape(8, 2)  # two heads of four rows
    assert write.interleaved(rows, 4)[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]


def test_llama3_factors_are_those_of_transformers() -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = family_model("llama").config
    config.rope_parameters, config.rope_theta, config.rope_scaling, config.head_dim = rope, 500000.0, rope, 64
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(llama3_factors(rope, 500000.0, 64), plain / scaled, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama3", "linear"])
def test_scaled_rotary_embeddings_compute_the_same_in_llama_cpp(tmp_path: Path, kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    same_in_llama_cpp(family_folder(tmp_path / "model", "llama", rope_parameters=rope), tmp_path / "out.gguf")


# Refusals: one sentence, before anything is written.


def refused(tmp_path: Path, folder: Path, *offenders: str, **options: Any) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SaapError) as caught:
        export_gguf(folder, tmp_path / "out.gguf", **options)
    for offender in offenders:
        assert offender in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_sizes_that_blocks_do_not_divide_are_named(tmp_path: Path) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={1: tuple(range(40))}, attention={}, **DIVISIBLE)
    refused(tmp_path, folder, "model.layers.1.mlp.down_proj.weight (40)", "--align 32", quantization="q8_0")


def test_layers_that_differ_in_other_families_are_named(tmp_path: Path) -> None:
    folder = adaptive_folder(tmp_path, "qwen3", ffn={1: HALF}, attention={})
    refused(tmp_path, folder, "qwen3 with an output of its own", "layers 1", "--layout uniform")
    folder = adaptive_folder(tmp_path / "gemma", "gemma2", ffn={1: HALF}, attention={})
    refused(tmp_path, folder, "no gemma2 whose layers differ", "layers 1", "--layout uniform")


def test_factors_of_rotary_frequencies_without_a_place_are_named(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    options: dict[str, Any] = {"tie_word_embeddings": True, "rope_parameters": rope}
    folder = adaptive_folder(tmp_path, "qwen3", ffn={1: HALF}, attention={}, **options)
    refused(tmp_path, folder, "openelm has no factors", "--layout uniform")


def test_a_rotary_embedding_that_gemma4_cannot_scale_is_named(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    for name, named, kind in (("gemma", "sliding window", "linear"), ("gemma3", "'yarn'", "yarn")):
        given: Any = {**rope, "rope_type": kind}
        if name == "gemma3":
            given = {"full_attention": given, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
        folder = adaptive_folder(tmp_path / name, name, ffn={1: HALF}, attention={}, rope_parameters=given)
        refused(tmp_path, folder, "gemma4", named, "--layout uniform")


def test_added_biases_without_a_place_are_named(tmp_path: Path) -> None:
    saap.prune(family_folder(tmp_path / "model", "qwen3"), roles=("ffn",), out=tmp_path / "out", **FLAP)
    refused(tmp_path, tmp_path / "out", "qwen3 has no place", "model.layers.0.mlp.down_proj.bias", "--restore")


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, family_folder(tmp_path / "model", "gpt_neox"), "gpt_neox", "qwen2")


@pytest.mark.parametrize(
    ("changes", "offender"),
    [
        ({"hidden_act": "relu"}, "'relu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_named(tmp_path: Path, changes: dict[str, Any], offender: str) -> None:
    refused(tmp_path, family_folder(tmp_path / "model", "llama", **changes), offender)


def test_windows_in_other_layers_are_named(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", "gemma2", layer_types=["full_attention", *["sliding_attention"] * 2])
    refused(tmp_path, folder, "layers 0, 1")


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    family_model("llama").save_pretrained(folder)
    refused(tmp_path, folder, "no tokenizer")


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", "llama", **{"vocab_size": 100})
    refused(tmp_path, folder, "320 tokens", "100 rows")


def test_added_tokens_beyond_the_embedding_are_left_out(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    rows = len(tokenizer)
    expected = fields_from_huggingface(tokenizer, rows)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"], "pad_token": "<beyond>"})
    fields = dict(fields_from_huggingface(tokenizer, rows))
    assert "pad_token_id" not in fields
    assert fields == {name: value for name, value in expected if name != "pad_token_id"}
    family_model("llama", vocab_size=rows).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = export_gguf(tmp_path / "model", tmp_path / "out.gguf", quantization="f32")
    assert done.same_tokens


def test_stored_rotary_frequencies_are_left_out(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    same_in_llama_cpp(folder, tmp_path / "out.gguf")


@pytest.mark.parametrize("emptied", [{"merges": []}, {"merges": [], "vocab": {}}])
def test_a_tokenizer_without_merges_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], emptied: dict[str, Any]
) -> None:
    folder, out = family_folder(tmp_path / "model", "llama"), tmp_path / "out.gguf"
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"].update(emptied)
    file.write_text(json.dumps(described))
    code, _, error = run(capsys, "export", folder, "--out", out, "--no-verify", "--quiet")
    assert (code, out.exists()) == (2, False)
    assert error.splitlines()[-1].startswith("error: The tokenizer has no merges, ")


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", "llama")
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        export_gguf(folder, out)
    assert out.read_text() == "mine"
    export_gguf(folder, out, overwrite=True, verify=False)
    assert out.read_bytes()[:4] == b"GGUF"
    (tmp_path / "other.Modelfile").write_text("mine")
    with pytest.raises(OutputError, match=r"other\.Modelfile exists"):
        export_gguf(folder, tmp_path / "other.gguf", verify=False)
    assert (tmp_path / "other.Modelfile").read_text() == "mine"
    assert not (tmp_path / "other.gguf").exists()
    with pytest.raises(OutputError, match="would replace the model"):
        export_gguf(out, out, overwrite=True, verify=False)


def test_an_unknown_type_is_a_setting_of_the_export(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--quantization 'q5' is unknown\. .*q5_k_m"):
        export_gguf(tmp_path / "model", tmp_path / "out.gguf", quantization="q5")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = family_folder(tmp_path / "model", "llama"), tmp_path / "sub" / "out.gguf"
    code, said, error = run(capsys, "export", folder, "--out", out, "--json")
    assert code == 0, error
    shown = json.loads(said)
    assert shown["equal_predictions"] > 0.95
    assert Path(shown["modelfile"]).read_text().startswith("FROM ./out.gguf\n")
    code, _, error = run(capsys, "export", folder, "--out", out, "--quantization", "q3")
    assert (code, "q8_0" in error) == (2, True)


# Tokenizers.

TEXTS = ["Hello  world, it's 12345 o'clock!\n\nÄrger über ½ ✓ 東京", "<eos>a<eos> b", evaluation_text()[:2000]]


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over pieces with single bytes to fall back on, as sentencepiece makes it."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    inner.train_from_iterator(evaluation_text()[:20000].split("\n"), trainer)
    described = json.loads(inner.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return made


@pytest.mark.parametrize("made", [tiny.tokenizer, pieces_tokenizer])
def test_llama_cpp_cuts_text_like_the_tokenizer(tmp_path: Path, made: Any) -> None:
    tokenizer = made()
    rows = len(tokenizer) + 3
    folder = tmp_path / "model"
    family_model("llama", vocab_size=rows).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done = export_gguf(folder, tmp_path / "out.gguf", verify=False)
    with LlamaCpp(done.path, context=64) as runtime:
        assert runtime.vocabulary == rows
        for text in TEXTS:
            assert runtime.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids
    again = fields_from_gguf(done.path, tokenizer.get_vocab(), rows)
    assert again is not None
    written = fields_from_huggingface(tokenizer, rows)
    assert [value for _, _, value, *_ in again] == [value for _, value in written]
    assert fields_from_gguf(done.path, {**tokenizer.get_vocab(), "<unknown>": 1}, rows) is None
    assert fields_from_gguf(done.path, {**tokenizer.get_vocab(), "<beyond>": rows}, rows) == again


def test_an_unknown_way_to_cut_is_refused() -> None:
    tokenizer = byte_tokenizer()
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ExportError, match="Punctuation"):
        fields_from_huggingface(tokenizer, 300)


def test_fields_are_read_as_the_package_reads_them(tmp_path: Path) -> None:
    done = export_gguf(family_folder(tmp_path / "model", "gemma2"), tmp_path / "out.gguf", verify=False)
    reader = gguf.GGUFReader(done.path)
    for key, field in read_header(done.path).fields.items():
        expected = reader.fields[key]
        element = expected.types[-1] if len(expected.types) > 1 else None
        assert field == (expected.contents(), expected.types[0], element)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(done.path.read_bytes()[:2000])
    with pytest.raises(ModelError, match="too early"):
        read_header(cut)


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_the_chat_template_is_carried_over(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template=CHATML)
    assert dict(fields_from_huggingface(tokenizer, 256))["chat_template"] == CHATML
    template = chat_template(tokenizer)
    assert template is not None
    assert template.startswith('{{- range $index, $message := .Messages }}{{ if eq .Role "system" }}<|system|>')
    assert template.endswith("<end><|assistant|>{{ .Content }}{{ end }}{{ end }}<end><|assistant|>")
    assert 'TEMPLATE """' in modelfile(tmp_path / "m.gguf", tokenizer, context=10**6)


def test_a_template_that_is_more_than_text_around_messages_is_left_to_ollama(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template="{{ raise_exception('no') }}")
    assert chat_template(tokenizer) is None
    text = modelfile(tmp_path / "m.gguf", tokenizer, context=512)
    assert text == "FROM ./m.gguf\nPARAMETER num_ctx 512\n"


def test_llama_cpp_adds_the_first_token_itself_and_a_template_without_system_prompts_keeps_its_turns() -> None:
    refusing = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    template = chat_template(byte_tokenizer(chat_template=refusing, bos=True))
    assert template is not None
    assert "<bos>" not in template
    assert "{{ if eq $index 1 }}<|user|>{{ else }}" in template
