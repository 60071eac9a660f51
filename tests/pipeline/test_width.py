"""Hidden channels through the whole run: pruned, written, opened, equal; or refused with the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.export.gguf_models import family_folder
from tests.export.llama import plan_of
from tests.families import build, token_ids

import saap
from saap.core.errors import TargetError
from saap.core.records import Role
from saap.models.structure.masking import masked
from saap.models.walk.backend import Backend
from saap.structure_search.evaluator import StructureEvaluator
from saap.surgery.cut import cut

SETTINGS: dict[str, Any] = {"samples": 4, "sample_length": 32, "refit_tokens": 1024, "align": 4, "effort": "fast"}
TOKENS = torch.arange(2, 42).reshape(2, 20)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "mixtral"])
def test_width_and_ffn_together_are_written_and_opened(family: str, tmp_path: Path) -> None:
    source = family_folder(tmp_path / "dense", family, max_position_embeddings=1024)
    out = tmp_path / "small"
    result = saap.prune(source, pruning_ratio=0.3, out=out, roles=["hidden", "ffn"], strategy="uniform", **SETTINGS)
    roles = {Role.HIDDEN if name == "hidden" else Role.FFN for name in result.plan.keep}
    assert roles == {Role.HIDDEN, Role.FFN}
    assert result.report.pruning_ratio >= 0.3
    opened = saap.load(out)
    assert sum(parameter.numel() for parameter in opened.parameters()) == result.plan.parameters
    assert opened.get_input_embeddings().weight.shape[1] == len(result.plan.keep["hidden"]) < 48
    torch.testing.assert_close(logits(opened), logits(result.model), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["adaptive", "uniform"])
def test_all_roles_together_leave_embeddings_tied(layout: str, tmp_path: Path) -> None:
    source = family_folder(tmp_path / "dense", "llama_tied", max_position_embeddings=1024, num_hidden_layers=4)
    out = tmp_path / "small"
    result = saap.prune(
        source, pruning_ratio=0.7, out=out, layout=layout, roles=["hidden", "block", "ffn", "attention"],
        strategy="uniform", **SETTINGS,
    )  # fmt: skip
    plan = result.plan
    lost = {name.rpartition(".")[2] for name, kept in plan.keep.items() if len(kept) < sizes_of(source)[name]}
    assert {"hidden", "ffn", "attention"} <= lost
    assert 0 < len(plan.dropped_blocks) < 4
    assert result.report.pruning_ratio >= 0.7
    opened = saap.load(out)
    assert len(opened.model.layers) == 4 - len(plan.dropped_blocks)
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in opened.parameters()) == plan.parameters
    torch.testing.assert_close(logits(opened), logits(result.model), rtol=0, atol=0)
    if layout == "uniform":
        stock = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert type(stock) is transformers.LlamaForCausalLM
        torch.testing.assert_close(logits(stock), logits(opened), rtol=0, atol=0)


def sizes_of(source: Path) -> dict[str, int]:
    return {group.name: group.units for group in saap.discover(source).groups}


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "mixtral"])
def test_the_judge_sees_the_narrower_stream_as_the_cut_leaves_it(family: str) -> None:
    model = build(family)
    graph = saap.discover(model)
    keep = {
        "hidden": tuple(range(5, 48)),
        **{group.name: tuple(range(8, group.units)) for group in graph.of_role(Role.FFN) if group.layer == 0},
    }
    tokens = token_ids(2, 9)
    pruned = copy.deepcopy(model)
    plan = plan_of(graph, keep)
    cut(pruned, graph, plan)
    with torch.no_grad():
        before, after = (one(tokens, use_cache=False).logits for one in (model, pruned))
        with masked(model, graph, plan.keep, plan.dropped_blocks):
            torch.testing.assert_close(model(tokens, use_cache=False).logits, after, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(tokens, use_cache=False).logits, before)
    dense, left = (one.float().log_softmax(-1) for one in (before, after))
    expected = torch.nn.functional.kl_div(left, dense, log_target=True, reduction="sum") / tokens.numel()
    assert StructureEvaluator(Backend(model, graph), tokens)(keep).mean() == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(("family", "norm"), [("gpt2", "ln_1"), ("opt", "self_attn_layer_norm")])
def test_layer_norms_refuse_the_width_by_name(family: str, norm: str, tmp_path: Path) -> None:
    source = family_folder(tmp_path / "dense", family, max_position_embeddings=1024)
    with pytest.raises(TargetError, match=rf"no hidden groups can be pruned.*layer_norm in .*{norm} is a statistic"):
        saap.prune(source, pruning_ratio=0.2, out=tmp_path / "small", roles=["hidden"], **SETTINGS)
    assert not (tmp_path / "small").exists()
