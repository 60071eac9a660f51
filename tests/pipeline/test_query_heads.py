"""Query heads inside their KV groups as units, from the folder to the pruned folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline import tiny
from transformers import AutoModelForCausalLM

import saap
from saap.core.errors import ConfigurationError, TargetError

SETTINGS: dict[str, Any] = {"samples": 4, "sample_length": 32, "refit_tokens": 1024, "align": 8, "effort": "fast"}
TOKENS = torch.arange(2, 42).reshape(2, 20)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("heads"), layers=3, num_attention_heads=8)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize(
    ("layout", "roles", "ratio"), [("adaptive", ["ffn", "query"], 0.35), ("uniform", ["query"], 0.15)]
)
def test_each_kv_group_loses_as_many_heads_of_its_own(
    source: Path, tmp_path: Path, layout: str, roles: list[str], ratio: float
) -> None:
    out = tmp_path / "small"
    result = saap.prune(
        source, pruning_ratio=ratio, out=out, layout=layout, roles=roles, strategy="uniform", **SETTINGS
    )
    heads = [
        [result.plan.keep[f"layers.{layer}.query.{group}"] for group in range(2)]
        for layer in range(3)
        if f"layers.{layer}.query.0" in result.plan.keep
    ]
    assert all(len(first) == len(second) for first, second in heads)
    assert any(len(first) < 4 for first, _ in heads)
    assert any(path.endswith("o_proj") for path in result.report.refit_errors)
    assert sum(parameter.numel() for parameter in result.model.parameters()) == result.plan.parameters
    opened = saap.load(out)
    torch.testing.assert_close(logits(opened), logits(result.model), rtol=0, atol=0)
    if layout == "uniform":
        stock = AutoModelForCausalLM.from_pretrained(out)
        assert stock.config.num_attention_heads == 2 * len(heads[0][0])
        assert stock.config.num_key_value_heads == 2
        torch.testing.assert_close(logits(stock), logits(opened), rtol=0, atol=0)
    assert opened.generate(TOKENS[:1], max_new_tokens=4, do_sample=False).shape[1] == 24


def test_the_judge_compares_structures_with_fewer_heads(source: Path) -> None:
    file_settings = {**SETTINGS, "effort": "default", "refit_tokens": 1024}
    result = saap.prune(source, pruning_ratio=0.15, roles=["ffn", "query"], **file_settings)
    assert len(result.plan.trail) > 1


def test_what_cannot_be_asked_is_refused(source: Path, tmp_path: Path) -> None:
    of_a_baseline = {**SETTINGS, "refit_tokens": None}
    with pytest.raises(ConfigurationError, match="attention and query cannot be combined"):
        saap.prune(source, pruning_ratio=0.2, roles=["attention", "query"], **SETTINGS)
    with pytest.raises(ConfigurationError, match="flap does not score units of the role query"):
        saap.prune(source, pruning_ratio=0.2, roles=["ffn", "query"], method="flap", **of_a_baseline)
    with pytest.raises(ConfigurationError, match="random does not score units of the role hidden"):
        saap.prune(
            source, pruning_ratio=0.2, roles=["ffn", "hidden"], method="random", layout="uniform", **of_a_baseline
        )
    single = tiny.folder(tmp_path / "dense", num_key_value_heads=4)
    with pytest.raises(TargetError, match="no query groups can be pruned"):
        saap.prune(single, pruning_ratio=0.1, roles=["query"], **SETTINGS)
