"""Removed experts are merged into the kept ones by least squares."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.families import build, configuration, randomised
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from saap.core.errors import UnsupportedModelError
from saap.core.records import Layout, ModelGraph, Role, StructurePlan
from saap.discovery import discover
from saap.models.walk.backend import Backend
from saap.models.walk.observer import capture
from saap.structure_search.plan import make_plan
from saap.surgery.cut import cut
from saap.surgery.merging import require_mergeable, rows_to_fit
from saap.surgery.reconstruct import ReconstructionSettings, reconstruct

FAMILIES = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3_moe")


def tokens(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 128, (rows, 32), generator=torch.Generator().manual_seed(seed))


def plan_without(graph: ModelGraph, removed: int = 1) -> StructurePlan:
    """The last experts of every group are removed."""
    keep = {one.name: tuple(range(one.units - removed)) for one in graph.of_role(Role.EXPERT)}
    return make_plan(graph, keep, (), layout=Layout.ADAPTIVE, strategy="test", align=1)


def reconstructed(dense: nn.Module, graph: ModelGraph, *, merge: bool, rows: int = 48) -> tuple[Any, dict[str, float]]:
    model, plan = copy.deepcopy(dense), plan_without(graph)
    settings = ReconstructionSettings(second_order=False, merge=merge)
    done = reconstruct(Backend(model, graph), plan, tokens(rows), settings)
    cut(model, graph, plan)
    return model, done.errors


@torch.no_grad()
def experts_of(model: Any, path: str, ids: Tensor) -> tuple[Tensor, ...]:
    with capture(model, [path]) as seen:
        model(ids, use_cache=False)
    return seen[path].arguments


def distance(model: Any, dense: Any) -> float:
    with torch.no_grad():
        one, other = (each(tokens(8, seed=1), use_cache=False).logits for each in (model, dense))
    return float((one - other).square().mean())


def test_experts_that_add_their_share_add_what_is_missing() -> None:
    """By hand: two experts of one token, with the gates 0.6 and 0.3; both targets are met exactly."""
    x, weights = torch.tensor([[2.0]]).double(), [torch.tensor([[1.0]]).double(), torch.tensor([[-3.0]]).double()]
    gates, missing = torch.tensor([[0.6, 0.3]]).double(), torch.tensor([[1.8]]).double()
    total, present, merged = gates.sum(1, keepdim=True), 0.0, 0.0
    for weight, gate in zip(weights, gates[0], strict=True):
        rows, target = rows_to_fit(x, weight, gate.view(1, 1), total, missing)
        new = target.T @ torch.linalg.pinv(rows.T)
        present += float(gate * x @ weight.T)
        merged += float(gate * x @ new.T)
    assert merged == pytest.approx(present + 1.8)


def test_the_error_of_the_layer_is_at_most_that_of_its_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    gates = torch.rand(50, 3, generator=generator).double()
    total, missing = gates.sum(1, keepdim=True), torch.randn(50, 5, generator=generator).double()
    left, bound = missing.clone(), 0.0
    for expert in range(3):
        x, weight, change = (torch.randn(size, generator=generator).double() for size in ((50, 4), (5, 4), (5, 4)))
        gate = gates[:, expert : expert + 1]
        rows, target = rows_to_fit(x, weight, gate, total, missing)
        bound += float((target - rows @ (weight + change).T).square().sum())
        left -= gate * x @ change.T
    assert float(left.square().sum()) <= bound


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_experts_are_nearer_to_the_dense_model(family: str) -> None:
    dense = build(family).float()
    graph = discover(dense)
    require_mergeable(Backend(dense, graph))
    (plain, without), (merged, errors) = (reconstructed(dense, graph, merge=merge) for merge in (False, True))
    stacks = {name: error for name, error in errors.items() if name not in without}
    assert len(stacks) == len({one.layer for one in graph.of_role(Role.EXPERT)})
    assert all(error <= 1 for error in errors.values())
    assert max(stacks.values()) < 0.99
    assert [one.shape for one in merged.parameters()] == [one.shape for one in plain.parameters()]
    assert distance(merged, dense) < distance(plain, dense)


def test_only_the_down_projections_of_kept_experts_change() -> None:
    dense = build("mixtral").float()
    graph = discover(dense)
    merged, _ = reconstructed(dense, graph, merge=True)
    old, new = (model.model.layers[0].mlp for model in (dense, merged))
    assert torch.equal(new.gate.weight, old.gate.weight[:3])
    assert torch.equal(new.experts.gate_up_proj, old.experts.gate_up_proj[:3])
    assert not torch.equal(new.experts.down_proj, old.experts.down_proj[:3])


def test_an_expert_without_tokens_stays_as_it_is() -> None:
    settings = configuration("mixtral")
    settings.num_local_experts = 6
    dense = randomised(AutoModelForCausalLM.from_config(settings, attn_implementation="eager")).float()
    for block in dense.model.layers:
        row = block.mlp.gate.weight[0].clone()  # of the first four, two of one sign are above zero
        block.mlp.gate.weight.copy_(torch.stack([row, -row, row / 2, -row / 2, row * 0, row * 2]))
    graph = discover(dense)
    merged, _ = reconstructed(dense, graph, merge=True)
    chosen = experts_of(merged, "model.layers.0.mlp.experts", tokens(48))[1]
    unused = sorted(set(range(5)) - set(chosen.flatten().tolist()))
    assert unused == [4]
    old, new = (model.model.layers[0].mlp.experts.down_proj for model in (dense, merged))
    assert torch.equal(new[4], old[4])
    assert not torch.equal(new[:4], old[:4])


def test_channels_that_experts_lose_have_an_error_of_their_own() -> None:
    dense = build("mixtral").float()
    graph = discover(dense)
    keep = {one.name: tuple(range(one.units // 2)) for one in (*graph.of_role(Role.EXPERT), *graph.of_role(Role.FFN))}
    plan = make_plan(graph, keep, (), layout=Layout.ADAPTIVE, strategy="test", align=1)
    done = reconstruct(Backend(dense, graph), plan, tokens(16), ReconstructionSettings(merge=True))
    path = "model.layers.0.mlp.experts"
    assert {path, f"{path}.down_proj"} <= done.errors.keys()


def test_what_is_missing_is_read_once_for_so_many_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = build("mixtral").float()
    graph = discover(dense)
    together, _ = reconstructed(dense, graph, merge=True)
    monkeypatch.setattr("saap.surgery.merging.MOMENTS_BYTES", 1)
    alone, _ = reconstructed(dense, graph, merge=True)
    for one, other in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_experts_that_are_not_given_their_tokens_are_refused() -> None:
    model = build("llama4_text")
    with pytest.raises(UnsupportedModelError, match=r"experts of each token .* Leave out --merge-experts"):
        require_mergeable(Backend(model, discover(model)))


@pytest.mark.parametrize(
    "change",
    [lambda output: output / output.norm(), lambda output: SimpleNamespace(reshape=output.reshape)],
    ids=["norm", "no tensor"],
)
def test_experts_that_change_the_sum_of_their_outputs_are_refused(change: Callable[[Tensor], Any]) -> None:
    model = build("mixtral")
    backend = Backend(model, discover(model))
    require_mergeable(backend)
    experts = model.model.layers[0].mlp.experts
    stock = experts.forward
    experts.forward = lambda *arguments: change(stock(*arguments))
    with pytest.raises(UnsupportedModelError, match=r"weighted sum .* Leave out --merge-experts"):
        require_mergeable(backend)
