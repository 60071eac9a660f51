"""Hidden channels through the whole run: pruned, written, opened, equal; or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.families import FAMILIES
from tests.pipeline import tiny

import saap
from saap.errors import TargetError
from saap.records import Role

SETTINGS: dict[str, Any] = {"samples": 4, "sample_length": 32, "refit_tokens": 1024, "align": 4, "effort": "fast"}
TOKENS = torch.arange(2, 42).reshape(2, 20)


def folder(at: Path, family: str) -> Path:
    """The family's tiny model in float32 with a tokenizer."""
    torch.manual_seed(0)
    kind, sizes = FAMILIES[family]
    config = getattr(transformers, kind)(**{**sizes, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 1024})
    transformers.AutoModelForCausalLM.from_config(config).eval().save_pretrained(at)
    tiny.tokenizer().save_pretrained(at)
    return at


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "mixtral"])
def test_width_and_ffn_together_are_written_and_opened(family: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "dense", family)
    out = tmp_path / "small"
    result = saap.prune(source, pruning_ratio=0.3, out=out, roles=["hidden", "ffn"], strategy="uniform", **SETTINGS)
    roles = {Role.HIDDEN if name == "hidden" else Role.FFN for name in result.plan.keep}
    assert roles == {Role.HIDDEN, Role.FFN}
    assert result.report.pruning_ratio >= 0.3
    opened = saap.load(out)
    assert sum(parameter.numel() for parameter in opened.parameters()) == result.plan.parameters
    assert opened.get_input_embeddings().weight.shape[1] == len(result.plan.keep["hidden"]) < 48
    torch.testing.assert_close(logits(opened), logits(result.model), rtol=0, atol=0)


@pytest.mark.parametrize(("family", "norm"), [("gpt2", "ln_1"), ("opt", "self_attn_layer_norm")])
def test_layer_norms_refuse_the_width_by_name(family: str, norm: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "dense", family)
    with pytest.raises(TargetError, match=rf"no hidden groups can be pruned.*layer_norm in .*{norm} is a statistic"):
        saap.prune(source, pruning_ratio=0.2, out=tmp_path / "small", roles=["hidden"], **SETTINGS)
    assert not (tmp_path / "small").exists()
