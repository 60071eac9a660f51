"""Baselines through the ordinary run."""

from __future__ import annotations

import pytest
import torch
from tests.pipeline import tiny

import saap
from saap.baselines import activations
from saap.evaluation.perplexity import model_logits
from saap.pipeline.prune.run import RunOptions, run_prune
from saap.settings.prune import PruneConfig
from saap.settings.registry import Method

SETTINGS = {"effort": "fast", "samples": 4, "sample_length": 32, "align": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("dense"), layers=6)


@pytest.mark.parametrize("method", [method for method in Method if method is not Method.SAAP])
def test_every_baseline_writes_a_model_that_opens_as_it_was(source, tmp_path, method) -> None:
    out = tmp_path / "small"
    result = saap.prune(source, pruning_ratio=0.2, method=method, out=out, **SETTINGS)
    assert result.report.pruning_ratio >= 0.2
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model_logits(saap.load(out), ids), model_logits(result.model, ids))
    if method is Method.BLOCK_INFLUENCE:
        assert len(result.plan.dropped_blocks) == 2
    else:
        assert not result.plan.dropped_blocks
    biases = [name for name, _ in saap.load(out).named_parameters() if name.endswith(".bias")]
    assert bool(biases) is (method is Method.FLAP)


def test_llm_pruner_spares_the_ends_and_the_others_do_not(source) -> None:
    pruner = saap.prune(source, pruning_ratio=0.1, method="llm-pruner-element1", **SETTINGS).plan
    assert not [name for name in pruner.keep if name.startswith("layers.0.")]
    wanda = saap.prune(source, pruning_ratio=0.1, method="wanda-sp", **SETTINGS).plan
    assert {name for name in wanda.keep if "ffn" in name} == {f"layers.{layer}.ffn" for layer in range(6)}


def test_compensation_brings_the_block_output_back(source) -> None:
    without = saap.prune(source, pruning_ratio=0.3, method="flap", restore=True, refit_tokens=1024, **SETTINGS)
    assert not [name for name, _ in without.model.named_parameters() if name.endswith(".bias")]
    random = saap.prune(source, pruning_ratio=0.3, method="random", **SETTINGS)
    assert random.report.refit_errors == {}


def test_several_results_share_one_pass_over_the_text(source, monkeypatch) -> None:
    passes: list[object] = []
    walk = activations.walk
    monkeypatch.setattr(activations, "walk", lambda *one, **more: passes.append(one) or walk(*one, **more))
    config = PruneConfig(pruning_ratios=(0.1, 0.2), method="flap", **SETTINGS)
    results = run_prune(source, config, RunOptions(device="cpu"))
    assert len(passes) == 1
    assert all(any(name.endswith(".bias") for name, _ in one.model.named_parameters()) for one in results)


def test_a_pruned_model_with_biases_can_be_pruned_again(source, tmp_path) -> None:
    saap.prune(source, pruning_ratio=0.1, method="flap", out=tmp_path / "once", **SETTINGS)
    again = saap.prune(tmp_path / "once", pruning_ratio=0.1, method="magnitude", out=tmp_path / "twice", **SETTINGS)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model_logits(saap.load(tmp_path / "twice"), ids), model_logits(again.model, ids))


def test_biases_follow_their_blocks_where_blocks_are_dropped(source) -> None:
    roles = ["ffn", "attention", "block"]
    result = saap.prune(source, pruning_ratio=0.4, method="flap", roles=roles, **SETTINGS)
    plan = result.plan
    assert plan.dropped_blocks
    assert [layer for layer in range(6) if layer > min(plan.dropped_blocks) and layer not in plan.dropped_blocks]
    staying = [layer for layer in range(6) if layer not in plan.dropped_blocks]
    consumers = {"ffn": "mlp.down_proj", "attention": "self_attn.o_proj"}
    pruned = [name.split(".")[1:] for name in plan.keep]
    expected = {f"model.layers.{staying.index(int(layer))}.{consumers[role]}.bias" for layer, role in pruned}
    assert {name for name, _ in result.model.named_parameters() if name.endswith(".bias")} == expected
