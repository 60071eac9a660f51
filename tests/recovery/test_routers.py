"""Tuning of the routers alone: what it finds, what it changes, and what it gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests import families
from tests.pipeline import tiny
from tests.pipeline.test_experts import mixture
from tests.recovery.tiny import blocks
from torch import nn
from transformers import AutoModelForCausalLM

import saap
from saap.core.errors import ModelError
from saap.data.texts import evaluation_text
from saap.models.checkpoint.groupwise import linears_inside
from saap.models.structure.routers import find_routers
from saap.pipeline.recover import run
from saap.pipeline.shared.verify import few_logits
from saap.recovery.weights import TunedWeights

HELD_OUT = 2000
"""Characters of the text, at its end."""
PRUNING: dict[str, Any] = {"num_samples": 4, "sample_length": 32, "restore": False, "effort": "fast"}
TRAINING: dict[str, Any] = {"max_seq_length": 32, "batch_size": 4, "max_steps": 24, "validate_every": 4}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_routers_are_the_rows_next_to_the_experts(family: str) -> None:
    model = families.build(family)
    assert find_routers(model, blocks(model)) == [f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)]


@pytest.mark.parametrize(
    ("kind", "sizes", "names"),
    [
        ("GptOssConfig", {"num_local_experts": 4}, ["mlp.router.weight", "mlp.router.bias"]),
        ("DeepseekV3Config", {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1}, ["mlp.gate.weight"]),
        ("GraniteMoeConfig", {"num_local_experts": 4}, ["block_sparse_moe.router.weight"]),
        ("Qwen3NextConfig", {"num_experts": 4, "linear_num_value_heads": 4}, ["mlp.gate.weight"]),
    ],
)
def test_other_forms_of_routers(kind: str, sizes: dict[str, Any], names: list[str]) -> None:
    config = getattr(transformers, kind)(
        **sizes, vocab_size=64, hidden_size=48, intermediate_size=40, moe_intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=6, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = find_routers(model, ["model.layers.1"])
    assert sorted(found) == sorted(f"model.layers.1.{name}" for name in names)


class SeparateExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.choice = nn.Linear(8, 3)
        self.mix = nn.Conv1d(3, 3, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))


def test_experts_in_a_list_have_a_router_too() -> None:
    model = nn.ModuleDict({"layer": SeparateExperts()})
    assert find_routers(model, ["layer"]) == ["layer.choice.weight", "layer.choice.bias"]


def test_a_router_that_is_a_linear_layer_is_not_quantised() -> None:
    model = families.build("hunyuan_v1_moe")
    assert isinstance(model.get_submodule("model.layers.0.mlp.gate.wg"), nn.Linear)
    found = linears_inside(model, blocks(model))
    assert "model.layers.0.mlp.shared_mlp.up_proj" in found
    assert not [path for path in found if ".gate." in path]


def test_a_model_without_experts_is_refused() -> None:
    model = families.build("llama")
    with pytest.raises(ModelError, match="LlamaForCausalLM has no router in its blocks"):
        find_routers(model, blocks(model))


def test_routers_of_16_bits_are_trained_in_32() -> None:
    model = families.build("mixtral").bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    routers = TunedWeights(model, find_routers(model, blocks(model)))
    assert {value.dtype for value in routers.parameters.values()} == {torch.float32}
    tokens = families.token_ids()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    for value in routers.parameters.values():
        assert value.grad is not None
        value.data -= 0.5 * value.grad.sign()
    after = routers.merge_and_unload().state_dict()
    assert list(after) == list(before)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == set(routers.parameters)
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert not any(value.requires_grad for value in model.parameters())


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture that has learned a little of the text, so that its experts differ."""
    folder = mixture(tmp_path_factory.mktemp("dense"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).train(), tiny.tokenizer()
    ids = torch.tensor(tokenizer(evaluation_text()[:-HELD_OUT])["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        batch = windows[step * 8 % (len(windows) - 8) :][:8]
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def divergence(folder: Path, dense: Path) -> float:
    """Mean over held-out tokens of KL(dense || folder)."""
    tokens = torch.tensor(tiny.tokenizer()(evaluation_text()[-HELD_OUT:])["input_ids"])[:256].view(8, 32)
    q, p = (saap.load(one)(tokens).logits.log_softmax(-1) for one in (dense, folder))
    return float((q.exp() * (q - p)).sum(-1).mean())


@pytest.mark.parametrize("layout", ["uniform", "adaptive"])
def test_only_router_rows_change_and_the_divergence_falls(dense: Path, tmp_path: Path, layout: str) -> None:
    small, tuned = tmp_path / "small", tmp_path / "tuned"
    saap.prune(
        dense, pruning_ratio=0.4, out=small, roles=["expert"], importance="reap", layout=layout, **PRUNING,
    )  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text(evaluation_text()[:-HELD_OUT])
    result = saap.recover(small, data=[text], out=tuned, tuning="router", learning_rate=0.02, **TRAINING)
    before, after = (load_file(folder / "model.safetensors") for folder in (small, tuned))
    holder = "block_sparse_moe" if layout == "uniform" else "mlp"  # as published checkpoints name it
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        f"model.layers.{layer}.{holder}.gate.weight" for layer in range(3)
    }
    assert result.report.bits is None
    assert result.report.perplexity_dense is not None
    assert divergence(tuned, dense) < divergence(small, dense)
    assert (tuned / "config.json").read_bytes() == (small / "config.json").read_bytes()


def test_what_was_written_in_16_bits_is_compared_without_rounding_in_between(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding would send some tokens to other experts, which looks like a wrong file."""
    differences: list[float] = []

    def compared(name: str, model: nn.Module, ids: torch.Tensor, expected: torch.Tensor, limit: torch.Tensor) -> None:
        differences.append(float((few_logits(model, ids) - expected).abs().max() / expected.abs().max()))

    monkeypatch.setattr(run, "check_written", compared)
    text = tmp_path / "text.txt"
    text.write_text(evaluation_text())
    saap.recover(
        dense, data=[text], out=tmp_path / "tuned", tuning="router", learning_rate=0.02, dtype="bfloat16",
        **{**TRAINING, "max_steps": 2},
    )  # fmt: skip
    assert differences[0] < 1e-5
    assert {value.dtype for value in load_file(tmp_path / "tuned" / "model.safetensors").values()} == {torch.bfloat16}
