"""A mixture of experts from the folder to the pruned folder, and what is refused of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.export.llama import plan_of
from tests.noted import Noted
from tests.pipeline import tiny
from tests.processes import saap as saap_in_one
from tests.processes import saap_in_several
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import saap
from saap.core.errors import ConfigurationError, PlanError, TargetError, UnsupportedModelError
from saap.core.storage import PlanDocument
from saap.pipeline.prune import planning
from saap.pipeline.prune.result import structure_of
from saap.pipeline.prune.run import RunOptions, run_prune
from saap.settings.prune import PruneConfig
from saap.surgery import merging
from saap.surgery.cut import cut

SETTINGS: dict[str, Any] = {"samples": 4, "sample_length": 32, "refit_tokens": 1024, "align": 8, "effort": "fast"}
CUT_ONLY = {**SETTINGS, "restore": False, "refit_tokens": None}
TOKENS = torch.arange(2, 42).reshape(2, 20)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture(tmp_path_factory.mktemp("experts"))


def mixture(folder: Path, experts: int = 4) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, num_local_experts=experts,
        num_experts_per_tok=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    MixtralForCausalLM(config).eval().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("layout", ["adaptive", "uniform"])
def test_experts_are_pruned_written_and_opened(source: Path, tmp_path: Path, layout: str) -> None:
    out = tmp_path / "small"
    result = saap.prune(source, pruning_ratio=0.25, out=out, layout=layout, roles=["ffn"], **SETTINGS)
    assert sum(parameter.numel() for parameter in result.model.parameters()) == result.plan.parameters
    assert result.report.pruning_ratio >= 0.25
    kept = [units for name, units in result.plan.keep.items() if ".expert." in name]
    assert len(set(kept)) > 1
    assert all(len(units) % 8 == 0 for units in kept)
    opened = saap.load(out)
    torch.testing.assert_close(logits(opened), logits(result.model), rtol=0, atol=0)
    if layout == "uniform":
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), logits(opened), rtol=0, atol=0)
    assert opened.generate(TOKENS[:1], max_new_tokens=4, do_sample=False).shape[1] == 24


def test_channels_of_a_removed_expert_are_not_shown_as_kept(source: Path) -> None:
    result = saap.prune(source, pruning_ratio=0.2, layout="uniform", roles=["expert"], **CUT_ONLY)
    shown = {part[0]: part[1:] for part in structure_of(saap.discover(source), result.plan)[0].parts}
    left, every = shown["expert"]
    assert left < every
    assert shown["ffn"] == (48 * left, 48 * every)


def test_attention_beside_experts_is_restored(source: Path, tmp_path: Path) -> None:
    result = saap.prune(source, pruning_ratio=0.3, out=tmp_path / "small", **SETTINGS)
    assert result.report.refit_errors
    assert {path.rpartition(".")[2] for path in result.report.refit_errors} == {"o_proj", "down_proj"}


def test_a_shared_expert_beside_the_others_has_a_size_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
        shared_expert_intermediate_size=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    source = tmp_path / "dense"
    Qwen2MoeForCausalLM(config).eval().save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    result = saap.prune(source, pruning_ratio=0.3, out=tmp_path / "small", **SETTINGS)
    assert {name.partition(".ffn.")[2].partition(".")[0] for name in result.plan.keep if ".ffn." in name} == {"0", "1"}
    assert any("shared_expert.down_proj" in path for path in result.report.refit_errors)
    torch.testing.assert_close(logits(saap.load(tmp_path / "small")), logits(result.model), rtol=0, atol=0)


def test_methods_that_score_whole_matrices_are_refused_for_experts(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="stacks its experts"):
        saap.prune(source, pruning_ratio=0.2, out=tmp_path / "small", method="wanda-sp", **CUT_ONLY)


@pytest.mark.parametrize(
    ("layout", "roles", "pruning_ratio"),
    [("adaptive", ["expert"], 0.25), ("uniform", ["expert"], 0.25), ("adaptive", ["ffn", "expert"], 0.5)],
)
def test_whole_experts_leave_with_their_router_rows(
    source: Path, tmp_path: Path, layout: str, roles: list[str], pruning_ratio: float
) -> None:
    out = tmp_path / "small"
    result = saap.prune(source, pruning_ratio=pruning_ratio, out=out, layout=layout, roles=roles, **SETTINGS)
    kept = [len(result.plan.keep.get(f"layers.{layer}.expert", range(4))) for layer in range(3)]
    assert min(kept) < 4
    assert min(kept) >= 2  # each token is sent to two
    assert layout == "adaptive" or len(set(kept)) == 1
    assert sum(parameter.numel() for parameter in result.model.parameters()) == result.plan.parameters
    opened = saap.load(out)
    torch.testing.assert_close(logits(opened), logits(result.model), rtol=0, atol=0)
    for layer, count in enumerate(kept):
        block = opened.model.layers[layer].mlp
        assert len(block.gate.weight) == len(block.experts.down_proj) == block.experts.num_experts == count
    if layout == "uniform":
        stock = AutoModelForCausalLM.from_pretrained(out)
        assert stock.config.num_local_experts == kept[0]
        torch.testing.assert_close(logits(stock), logits(opened), rtol=0, atol=0)
    assert opened.generate(TOKENS[:1], max_new_tokens=4, do_sample=False).shape[1] == 24


@pytest.mark.parametrize(("importance", "layout"), [("reap", "uniform"), ("frequency", "adaptive")])
def test_experts_are_removed_by_scores_of_a_forward_pass(tmp_path: Path, importance: str, layout: str) -> None:
    source, out, reporter = mixture(tmp_path / "dense", experts=5), tmp_path / "small", Noted()
    model = AutoModelForCausalLM.from_pretrained(source)
    gate = model.model.layers[1].mlp.gate.weight.data
    gate[2:4], gate[4] = -gate[:2], 0  # two of the first four logits are always above that of the last
    model.save_pretrained(source)
    config = PruneConfig(pruning_ratio=0.2, layout=layout, roles="expert", importance=importance, **SETTINGS)
    (result,) = run_prune(source, config, RunOptions(out=out), reporter)
    assert len(result.plan.keep["layers.1.expert"]) < 5
    assert 4 not in result.plan.keep["layers.1.expert"]
    (note,) = [note for note in reporter.notes if "calibration token" in note]
    assert note == "1 of 15 experts got no calibration token and are removed first: 4 of layers.1.expert"
    torch.testing.assert_close(logits(saap.load(out)), logits(result.model), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["adaptive", "uniform"])
def test_removed_experts_are_merged(source: Path, tmp_path: Path, layout: str) -> None:
    given: dict[str, Any] = {**SETTINGS, "roles": ["expert"], "layout": layout, "pruning_ratio": 0.25}
    plain = saap.prune(source, out=tmp_path / "plain", **given)
    merged = saap.prune(source, out=tmp_path / "merged", merge_experts=True, **given)
    assert merged.plan.keep == plain.plan.keep
    stacks = set(merged.report.refit_errors) - set(plain.report.refit_errors)
    assert stacks
    assert all(path.endswith("mlp.experts") for path in stacks)
    opened = saap.load(tmp_path / "merged")
    torch.testing.assert_close(logits(opened), logits(merged.model), rtol=0, atol=0)
    assert not torch.equal(logits(opened), logits(plain.model))


def test_several_processes_merge_as_one_does(source: Path, tmp_path: Path) -> None:
    flags = (
        "--pruning-ratio", "0.25", "--roles", "expert", "--importance", "reap", "--merge-experts", "--num-samples", "4",
        "--sample-length", "32", "--refit-tokens", "4096", "--preset", "fast", "--output-dir",
    )  # fmt: skip
    assert saap_in_one("prune", source, *flags, tmp_path / "one").returncode == 0
    assert [one.returncode for one in saap_in_several(2, "prune", source, *flags, tmp_path / "two")] == [0, 0]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor)


def test_a_mixture_that_cannot_merge_is_refused_before_the_estimation(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "estimate", lambda *a, **k: pytest.fail("the estimation began"))
    monkeypatch.setattr(merging, "experts_and_gates", lambda arguments: None)
    with pytest.raises(UnsupportedModelError, match="Leave out --merge-experts"):
        saap.prune(source, pruning_ratio=0.25, out=tmp_path / "o", merge_experts=True, roles=["expert"], **SETTINGS)
    assert not (tmp_path / "o").exists()


def test_no_fewer_experts_stay_than_a_token_is_sent_to(source: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be removed"):
        saap.prune(source, pruning_ratio=0.6, out=tmp_path / "small", roles=["expert"], **SETTINGS)
    graph = saap.discover(source)
    with pytest.raises(PlanError, match=r"keeps 1 units of layers\.0\.expert\. Keep at least 2 .* routed to"):
        cut(saap.load(source), graph, plan_of(graph, {"layers.0.expert": (1,)}))


@pytest.mark.parametrize("layout", ["adaptive", "uniform"])
def test_groups_of_experts_lose_the_same_number_and_correction_biases_follow(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, moe_intermediate_size=24, n_routed_experts=12,
        num_experts_per_tok=2, n_group=3, topk_group=1, n_shared_experts=1, first_k_dense_replace=1, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    source, model = tmp_path / "dense", Glm4MoeForCausalLM(config).eval()
    biases = torch.arange(12.0) / 100
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.copy_(biases)
    model.save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    out = tmp_path / "small"
    result = saap.prune(source, pruning_ratio=0.2, out=out, layout=layout, roles=["expert"], **SETTINGS)
    opened = saap.load(out)
    torch.testing.assert_close(logits(opened), logits(result.model), rtol=0, atol=0)
    for layer in (1, 2):
        kept = [result.plan.keep.get(f"layers.{layer}.expert.{group}", range(4)) for group in range(3)]
        assert len({len(units) for units in kept}) == 1
        stay = [4 * group + unit for group, units in enumerate(kept) for unit in units]
        gate = opened.model.layers[layer].mlp.gate
        torch.testing.assert_close(gate.e_score_correction_bias, biases[stay])
        torch.testing.assert_close(gate.weight, model.model.layers[layer].mlp.gate.weight[stay])
    assert min(len(units) for name, units in result.plan.keep.items() if ".expert." in name) >= 2
    if layout == "uniform":
        stock = AutoModelForCausalLM.from_pretrained(out)
        assert stock.config.n_routed_experts == len(stay)
        torch.testing.assert_close(logits(stock), logits(opened), rtol=0, atol=0)
    else:
        smaller = saap.prune(out, pruning_ratio=0.1, out=tmp_path / "smaller", roles=["expert"], **SETTINGS)
        torch.testing.assert_close(logits(saap.load(tmp_path / "smaller")), logits(smaller.model), rtol=0, atol=0)
    graph = saap.discover(source)
    with pytest.raises(PlanError, match=r"different numbers of units of layers\.1\.expert\.0 and layers\.1\.expert\.1"):
        cut(saap.load(source), graph, plan_of(graph, {"layers.1.expert.0": (0, 1)}))
    dense = PlanDocument.model_validate({"format_version": 1, "groups": {"layers.0.expert": {"kept": 2}}})
    with pytest.raises(ValueError, match=r"layers\.0\.expert: the model has no such group"):
        dense.keep(graph)


def test_experts_are_asked_of_a_model_that_has_none(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no expert groups can be pruned"):
        saap.prune(tiny.folder(tmp_path / "dense"), pruning_ratio=0.2, roles=["expert"], **SETTINGS)
