from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.command import run
from tests.export.gguf_models import EMPTY, adaptive_folder, family_folder
from tests.pipeline import tiny
from tests.reporting.comparison import recovery_record
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from saap.core.errors import SaapError
from saap.models.loading.pretrained import load
from saap.pipeline.export.run import export_decilm

IDS = torch.arange(3, 15)[None]
HALF = tuple(range(0, 80, 2))


class DeciBlock(nn.Module):
    """A decoder layer by the rules that vLLM's DeciLMDecoderLayer states: a part that is no_op has no parameters."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        block = config.block_configs[layer]
        self.attends, self.has_ffn = not block.attention.no_op, not block.ffn.no_op
        sizes = {**config.to_dict(), "num_hidden_layers": 1}
        if self.attends:
            sizes["num_key_value_heads"] = config.num_attention_heads // block.attention.n_heads_in_group
        if self.has_ffn:
            assert not hasattr(block.ffn, "ffn_mult")  # else vLLM rounds the width up to a multiple of 256
            sizes["intermediate_size"] = block.ffn.intermediate_size
        own = type(config).__base__(**{name: value for name, value in sizes.items() if name != "block_configs"})
        own._attn_implementation = "eager"
        if self.attends:
            self.self_attn = LlamaAttention(own, 0)
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.has_ffn:
            self.mlp = LlamaMLP(own)
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, stream: Tensor, rotary: Any, mask: Tensor) -> Tensor:
        if self.attends:
            stream = stream + self.self_attn(self.input_layernorm(stream), rotary, mask)[0]
        if self.has_ffn:
            stream = stream + self.mlp(self.post_attention_layernorm(stream))
        return stream


@torch.no_grad()
def logits_by_the_rules(folder: Path) -> Tensor:
    """Logits from the folder alone; every stored tensor must have a place, every place a tensor."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tensors = load_file(folder / "model.safetensors")
    embedding, norm = tensors.pop("model.embed_tokens.weight"), tensors.pop("model.norm.weight")
    head = embedding if config.tie_word_embeddings else tensors.pop("lm_head.weight")
    layers = nn.ModuleList(DeciBlock(config, layer) for layer in range(config.num_hidden_layers))
    layers.load_state_dict({name.removeprefix("model.layers."): value for name, value in tensors.items()})
    stream = nn.functional.embedding(IDS, embedding)
    length = IDS.shape[1]
    mask = torch.full((1, 1, length, length), float("-inf")).triu(1)
    rotary = LlamaRotaryEmbedding(config)(stream, torch.arange(length)[None])
    for layer in layers:
        stream = layer(stream, rotary, mask)
    last = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
    last.weight.data = norm
    return last(stream) @ head.T


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize(
    ("ffn", "attention"),
    [({0: HALF, 2: tuple(range(33))}, {}), ({1: EMPTY}, {2: EMPTY}), ({1: EMPTY, 2: HALF}, {1: EMPTY})],
)
def test_the_folder_says_what_vllm_reads(tmp_path: Path, name: str, ffn: Any, attention: Any) -> None:
    folder = adaptive_folder(tmp_path, name, ffn=ffn, attention=attention)
    out = export_decilm(folder, tmp_path / "deci")
    with torch.no_grad():
        expected = load(folder, device="cpu")(IDS, use_cache=False).logits
    torch.testing.assert_close(logits_by_the_rules(out), expected, rtol=1e-4, atol=1e-4)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert "pruned_structure" not in config
    assert "vllm serve" in (out / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert tokenizer("one two").input_ids == tiny.tokenizer()("one two").input_ids


@pytest.mark.parametrize(
    ("attention", "offenders"),
    [({1: (0, 2)}, ["layer 1 has 4 of 6 query heads"]), ({0: EMPTY}, ["layer 0 has no attention"])],
)
def test_what_vllm_cannot_hold_is_named(tmp_path: Path, attention: Any, offenders: list[str]) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={}, attention=attention)
    with pytest.raises(SaapError) as caught:
        export_decilm(folder, tmp_path / "deci")
    assert all(offender in str(caught.value) for offender in [*offenders, "--roles ffn"])
    assert not (tmp_path / "deci").exists()


def test_other_families_and_existing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SaapError, match="qwen3"):
        export_decilm(family_folder(tmp_path / "model", "qwen3"), tmp_path / "deci")
    folder = family_folder(tmp_path / "llama", "llama")
    with pytest.raises(SaapError, match="exists"):
        export_decilm(folder, folder)


def test_the_card_says_the_manifest_as_plain_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = '"><img src=q onerror=alert(1)>\n# A heading\n[a](javascript:b)'
    folder = adaptive_folder(tmp_path, "llama", ffn={0: HALF}, attention={})
    file = folder / "saap" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest |= {"dtype": evil, "versions": {evil: evil}}
    manifest["base"] |= {"source": evil, "licence": evil}
    manifest["perplexity"]["text"] = evil
    manifest["recovery"] = {
        **recovery_record(), "settings": {"bits": evil}, "packed_bytes": 1, "data": [evil], "perplexity": {evil: 20.0},
    }  # fmt: skip
    file.write_text(json.dumps(manifest))
    code, _, error = run(capsys, "export", folder, "--format", "decilm", "--out", tmp_path / "vllm")
    assert code == 0, error
    _, front, card = (tmp_path / "vllm" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == evil
    assert "<" not in card
    assert "\n# A heading" not in card
    assert "[a](" not in card
