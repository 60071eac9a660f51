"""Families whose classes do something that others do not: pruned, written and opened, or refused in one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conformance import every_family
from tests.conformance.every_family import attempt, build, configuration, prune
from tests.pipeline import tiny
from tests.processes import python
from torch import nn

import saap
from saap.core.errors import ConfigurationError, SaapError, UnsupportedModelError
from saap.core.records import Layout
from saap.models.walk.walker import BlockWalker
from saap.pipeline.shared.legality import check_walk
from saap.pipeline.shared.progress import Silent

ROOT = Path(__file__).parents[2]


def folder_of(family: str, at: Path, **changes: Any) -> Path:
    build(family, **changes).save_pretrained(at / "dense")
    return at / "dense"


@pytest.mark.parametrize(
    "family",
    [
        "falcon_h1",  # a buffer that the model computes for its parts, never stored
        "minimax",  # a cache of its own, which transformers tells by the class's name
        "gemma4_text",  # heads of another width in some layers
        "deepseek_v3",  # keys written into an empty tensor, a part of them the same for all heads
        "kimi_linear",  # latent attention beside layers of linear attention
        "deepseek_v2",  # the same, with complex rotary embeddings
        "granitemoe_swa",  # a cache that is asked for among other keywords
        "xglm",  # a mask in torch's default type
    ],
)
def test_they_are_pruned_opened_and_generate_without_a_word(family: str, tmp_path: Path) -> None:
    found = attempt(family, tmp_path, [Layout.ADAPTIVE])["adaptive"]
    assert {**found, "seconds": 0} == {"outcome": "works", "seconds": 0}


@pytest.mark.parametrize("family", ["falcon_h1", "bamba", "granitemoehybrid"])
def test_a_pair_of_limits_is_no_list_of_two_layers(family: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"num_hidden_layers": 2}
    if family == "granitemoehybrid":
        changes["layer_types"] = ["linear_attention", "full_attention"]
    if family == "bamba":
        changes["attn_layer_indices"] = [1]
    result = prune(
        folder_of(family, tmp_path, **changes),
        tmp_path / "out",
        roles=("block",),
        skip_layers=(0, 1),
        pruning_ratio=0.3,
    )
    assert result.plan.dropped_blocks == (0,)
    limits = saap.load(tmp_path / "out").config.time_step_limit
    assert tuple(limits) == tuple(configuration(family).time_step_limit)


@pytest.mark.parametrize("family", ["mamba2", "nemotron_h"])
def test_whole_blocks_leave_where_nothing_inside_them_can(family: str, tmp_path: Path) -> None:
    source = folder_of(family, tmp_path)
    result = prune(source, tmp_path / "out", roles=("block",), pruning_ratio=0.2)
    assert len(result.plan.dropped_blocks) > 0
    assert saap.load(tmp_path / "out").num_parameters() == result.report.parameters
    with pytest.raises(ConfigurationError, match=r"scores a block by its units, and .* has none that can be removed"):
        prune(source, tmp_path / "other", method="block-influence", pruning_ratio=0.2, refit_tokens=None)


@pytest.mark.parametrize("layout", Layout)
def test_an_expert_takes_its_scale_along(layout: Layout, tmp_path: Path) -> None:
    model = build("gemma4_text", enable_moe_block=True, num_experts=6, top_k_experts=2, moe_intermediate_size=8)
    scales = {f"model.layers.{n}.router.per_expert_scale": torch.arange(6) + 6 * n + 1.0 for n in range(4)}
    model.load_state_dict(scales, strict=False)
    model.save_pretrained(tmp_path / "dense")
    result = prune(tmp_path / "dense", tmp_path / "out", layout, roles=("expert",), pruning_ratio=0.05, align=1)
    opened = saap.load(tmp_path / "out")
    for layer in range(4):
        kept = list(result.plan.keep.get(f"layers.{layer}.expert", range(6)))
        name = f"model.layers.{layer}.router.per_expert_scale"
        assert opened.get_parameter(name).round().tolist() == scales[name][kept].tolist()  # distilled a little
        assert len(kept) == len(opened.get_submodule(name.rpartition(".")[0]).proj.weight)
    assert sum(map(len, result.plan.keep.values())) < 24
    assert torch.equal(opened(every_family.TOKENS).logits, result.model(every_family.TOKENS).logits)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("gemma4_assistant", "The dense model itself does not run: Gemma4AssistantForCausalLM ends with"),
        ("gemma3n_text", "The blocks of Gemma3nForCausalLM do not run one by one ("),
        ("big_bird", "replaces its module bert.encoder.layer.0.attention.self"),
        ("jetmoe", "in model.layers.0.self_attention.experts.input_linear depends on the text"),
        ("longcat_flash", "cannot be traced: its control flow depends on values"),
    ],
)
def test_what_cannot_be_walked_or_traced_is_refused_before_the_estimation(
    family: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(SaapError, match=re.escape(said)) as refused:
        prune(folder_of(family, tmp_path), tmp_path / "out", roles=("ffn",), reporter=NoEstimation())
    assert str(refused.value).count("\n") == 0


def test_heads_that_later_blocks_read_too_are_refused_by_name() -> None:
    refused = {refusal.name: refusal.reason for refusal in saap.discover(build("gemma3n_text")).refused}
    assert {refused[f"layers.{layer}.attention"] for layer in range(4)} == {
        "its heads are tied to those of other blocks"
    }


class NoEstimation(Silent):
    """Fails where the expensive work begins."""

    def stage(self, title: str) -> None:
        assert "dense" not in title
        assert "estimate" not in title


def test_sequences_are_as_long_as_the_positions_of_the_model(tmp_path: Path) -> None:
    source = folder_of("gpt2", tmp_path, n_positions=48)
    assert prune(source, tmp_path / "out").report.perplexity > 0
    with pytest.raises(SaapError, match=r"GPT2LMHeadModel cannot process 64 tokens at once \(IndexError"):
        prune(source, tmp_path / "other", sample_length=64)


def test_a_model_in_training_is_tried_without_its_dropout() -> None:
    model = build("gpt2", resid_pdrop=0.5).train()
    assert prune(model, None).report.pruning_ratio > 0.1
    assert model.training


DISCOVER = """
import sys, saap
from saap.core.errors import SaapError
for folder in sys.argv[1:]:
    try:
        saap.discover(folder)
    except SaapError:
        pass
"""


def test_tracing_prints_nothing(tmp_path: Path) -> None:
    """Neither warnings of a configuration and of an export, nor the graph where an export fails."""
    folders = [folder_of(family, tmp_path / family) for family in ("gemma4_text", "recurrent_gemma", "longcat_flash")]
    done = python(DISCOVER, *folders)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_walk_that_gives_no_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    stock = BlockWalker.logits
    monkeypatch.setattr(BlockWalker, "logits", lambda walker, hidden: stock(walker, hidden) * torch.nan)
    with pytest.raises(UnsupportedModelError, match="differ between block by block and whole execution"):
        check_walk(model, [f"model.layers.{index}" for index in range(4)])


class _Unsaved(nn.Linear):
    def save_pretrained(self, folder: Path) -> None:
        raise OSError("no room")


def test_a_model_that_is_built_and_not_saved_is_no_model_that_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(every_family, "build", lambda family: _Unsaved(1, 1))
    found = attempt("llama", tmp_path)
    assert (found["outcome"], "no room" in found["message"]) == ("raised", True)


SWEEP = f"import runpy; runpy.run_path({str(ROOT / 'scripts' / 'family_sweep.py')!r}, run_name='__main__')"


def test_a_sweep_shows_what_was_printed_and_fails_for_it(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    works = {"outcome": "works", "seconds": 1.0}
    for noise, code in (({}, 0), ({"printed": "a trace"}, 1)):
        results.write_text(json.dumps({"llama": {"adaptive": {**works, **noise}, "uniform": works}}))
        done = python(SWEEP, "--results", results, "llama")
        assert (done.returncode, "a trace" in done.stdout) == (code, bool(noise)), done.stderr
