"""Models that also read images: their text part is pruned, and the folder opens as the family's own class does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.pipeline import tiny
from transformers import AutoModelForImageTextToText

import saap
from saap.errors import ExportError, LayoutError
from saap.models.loading import load

IMAGE = 319
TEXT = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
SETTINGS: dict[str, Any] = {"samples": 4, "sample_length": 32, "refit_tokens": 1024, "align": 8, "effort": "fast"}


def configuration(family: str) -> Any:
    if family == "llava":
        return transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=16),
            text_config=transformers.LlamaConfig(**TEXT), image_token_index=IMAGE, image_seq_length=4,
        )  # fmt: skip
    return transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION),
        text_config=transformers.Gemma3TextConfig(**TEXT, sliding_window=16, query_pre_attn_scalar=8),
        image_token_index=IMAGE, mm_tokens_per_image=4,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["llava", "gemma3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(configuration(request.param)).save_pretrained(at)
    tiny.tokenizer().save_pretrained(at)
    (at / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    return at


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[5, *[IMAGE] * 4, 9, 14, 3]])
    pixels = torch.rand(1, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    given = inputs()
    if model.config.to_dict().get("base_model_type", model.config.model_type) != "gemma3":
        del given["token_type_ids"]
    return model(**given, use_cache=False).logits


OUTSIDE = """
import sys, torch
from transformers import AutoModelForImageTextToText
assert not any(name.split(".")[0] == "saap" for name in sys.modules)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
given = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(**given, use_cache=False).logits, sys.argv[3])
"""


def test_the_adaptive_folder_opens_with_and_without_saap(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    result = saap.prune(source, pruning_ratio=0.2, out=out, **SETTINGS)
    assert result.plan.block_parameters < 0.8 * 1.01 * result.report.block_parameters_dense
    assert all("vision" not in name for name in result.plan.keep)
    expected = logits(result.model)
    assert torch.equal(logits(load(out, device="cpu")), expected)
    assert json.loads((out / "config.json").read_text())["auto_map"]["AutoModelForImageTextToText"]
    assert (out / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()
    usual = "gemma3" in source.name  # its class for images is also the one for text
    name = "AutoModelForCausalLM" if usual else "AutoModelForImageTextToText"
    assert f"from transformers import {name}, AutoTokenizer" in result.report.load_lines
    card = (out / "README.md").read_text()
    assert f"pipeline_tag: {'text-generation' if usual else 'image-text-to-text'}\n" in card
    assert f"model = {name}.from_pretrained(" in card
    load(out, device="cpu").save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", device="cpu")), expected)
    given = inputs()
    if "gemma3" not in source.name:
        del given["token_type_ids"]
    torch.save(given, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", OUTSIDE, str(out), str(tmp_path / "inputs.pt"), str(tmp_path / "logits.pt")]
    surroundings = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


def test_the_uniform_layout_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"(Llava|Gemma3|llava|gemma3).*--layout adaptive"):
        saap.prune(source, pruning_ratio=0.2, layout="uniform", out=tmp_path / "small", **SETTINGS)
    assert not (tmp_path / "small").exists()


def test_gguf_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Models of type (llava|gemma3) cannot be written"):
        saap.export_gguf(source, tmp_path / "out.gguf")
