from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from tests.families import build
from torch import nn

from saap.core.errors import CalibrationError
from saap.core.records import Layout, ModelGraph, StructurePlan
from saap.discovery import discover
from saap.models.walk.backend import Backend
from saap.models.walk.observer import hooked
from saap.models.walk.processes import Processes
from saap.structure_search.plan import make_plan
from saap.surgery.cut import cut
from saap.surgery.held_out import held_out_sequences
from saap.surgery.reconstruct import ReconstructionSettings, reconstruct
from saap.surgery.stacked import GramMatrices, stacks_of

FAMILIES = ("llama", "gemma2", "gpt2", "opt", "gpt_neox", "phi3", "bloom")


def half_plan(graph: ModelGraph) -> StructurePlan:
    keep = {group.name: tuple(range(0, group.units, 2)) for group in graph.groups if group.role == "ffn"}
    return make_plan(graph, keep, (), layout=Layout.ADAPTIVE, strategy="test", align=1)


def tokens(rows: int = 24, length: int = 16) -> torch.Tensor:
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(0))


def distance(model: nn.Module, dense: nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        one, other = (m(ids, use_cache=False).logits for m in (model, dense))
    return float((one - other).square().mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_reconstruction_comes_closer_to_the_dense_model(name: str) -> None:
    dense = build(name)
    graph = discover(dense)
    plan = half_plan(graph)
    plain, restored = copy.deepcopy(dense), copy.deepcopy(dense)
    cut(plain, graph, plan)
    result = reconstruct(Backend(restored, graph), plan, tokens(), ReconstructionSettings(second_order=False))
    cut(restored, graph, plan)
    assert all(error <= 1.0 for error in result.errors.values())
    unseen = torch.randint(2, 128, (8, 16), generator=torch.Generator().manual_seed(1))
    assert distance(restored, dense, unseen) < distance(plain, dense, unseen)
    shapes = [tuple(p.shape) for p in plain.parameters()]
    assert [tuple(p.shape) for p in restored.parameters()] == shapes


@pytest.mark.parametrize("name", FAMILIES)
def test_passes_that_multiply_in_bfloat16_restore_nearly_as_well(name: str) -> None:
    dense = build(name).float()
    graph = discover(dense)
    plan, unseen = half_plan(graph), torch.randint(2, 128, (8, 16), generator=torch.Generator().manual_seed(1))
    distances = {}
    for products in (None, torch.bfloat16):
        model = copy.deepcopy(dense)
        reconstruct(
            Backend(model, graph, products=products), plan, tokens(), ReconstructionSettings(second_order=False)
        )
        cut(model, graph, plan)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        distances[products] = distance(model, dense, unseen)
    assert distances[None] != distances[torch.bfloat16]
    assert distances[torch.bfloat16] == pytest.approx(distances[None], rel=0.1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
def test_the_gap_of_the_residual_stream_helps_the_whole_and_not_the_single_matrix(name: str) -> None:
    dense = build(name)
    graph = discover(dense)
    plan, unseen = half_plan(graph), torch.randint(2, 128, (8, 16), generator=torch.Generator().manual_seed(1))
    distances = {}
    for aims in (True, False):
        model = copy.deepcopy(dense)
        reconstruct(
            Backend(model, graph), plan, tokens(), ReconstructionSettings(second_order=False, residual_target=aims)
        )
        cut(model, graph, plan)
        distances[aims] = distance(model, dense, unseen)
    assert distances[True] != distances[False]
    assert distances[True] < distances[False]


def test_unpruned_blocks_before_the_first_cut_are_left_alone() -> None:
    dense = build("llama")
    graph = discover(dense)
    last = f"layers.{len(graph.blocks) - 1}.ffn"
    plan = make_plan(graph, {last: (0, 1, 2)}, (), layout=Layout.ADAPTIVE, strategy="test", align=1)
    model = copy.deepcopy(dense)
    reconstruct(Backend(model, graph), plan, tokens(), ReconstructionSettings())
    for (name, before), after in zip(dense.named_parameters(), model.parameters(), strict=True):
        if graph.block_of(name) < len(graph.blocks) - 1:
            assert torch.equal(before, after), name


def test_second_order_choice_keeps_the_plans_counts() -> None:
    dense = build("llama")
    graph = discover(dense)
    plan = half_plan(graph)
    model = copy.deepcopy(dense)
    result = reconstruct(Backend(model, graph), plan, tokens(), ReconstructionSettings(second_order=True))
    for name, kept in plan.keep.items():
        assert len(result.keep[name]) == len(kept)
    assert any(result.keep[name] != kept for name, kept in plan.keep.items())


def test_the_scores_weigh_in_on_the_second_order_choice() -> None:
    model = build("llama")
    graph = discover(model)
    plan = half_plan(graph)
    favoured = {g.name: np.where(np.arange(g.units) < g.units // 2, 1.0, 1e-12) for g in graph.groups}
    settings = ReconstructionSettings(second_order=True, scores=favoured)
    kept = reconstruct(Backend(model, graph), plan, tokens(), settings).keep
    assert all(kept[name] == tuple(range(len(plan.keep[name]))) for name in plan.keep)


@pytest.mark.parametrize("rows", [2, 4])
def test_sequences_of_one_micro_batch_fit_and_choose_the_ridge(rows: int) -> None:
    dense = build("llama")
    graph = discover(dense)
    result = reconstruct(
        Backend(dense, graph), half_plan(graph), tokens(rows, 128), ReconstructionSettings(second_order=False)
    )
    assert min(result.errors.values()) < 1.0


def test_how_many_sequences_judge() -> None:
    assert [held_out_sequences(n) for n in (2, 3, 4, 7, 8, 16, 32, 256)] == [1, 1, 2, 3, 4, 4, 4, 32]


def test_a_single_sequence_is_refused() -> None:
    dense = build("llama")
    graph = discover(dense)
    with pytest.raises(CalibrationError, match="has 1 sequence of text"):
        reconstruct(Backend(dense, graph), half_plan(graph), tokens(1), ReconstructionSettings())


class Recorded(deque[torch.Tensor]):
    """A sequence that is consumed while it is read, and what was ever in it."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.ever: list[torch.Tensor] = []
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: torch.Tensor, /) -> None:
        self.ever.append(tensor)
        super().append(tensor)


class Recording:
    """Keeps every sequence of activations that the walk makes."""

    def __init__(self) -> None:
        self.made: list[list[torch.Tensor]] = []

    def keep(self, tensors: Iterable[torch.Tensor]) -> deque[torch.Tensor]:
        found = Recorded(tensors)
        self.made.append(found.ever)
        return found


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_only_what_a_bfloat16_model_computes_is_of_bfloat16(name: str) -> None:
    """Of each block: what is lacking before it and between its modules, and what it gives without the last output."""
    dense = build(name).bfloat16()
    graph = discover(dense)
    spill = Recording()
    backend = Backend(dense, graph, spill=spill)  # type: ignore[arg-type]
    reconstruct(backend, half_plan(graph), tokens(), ReconstructionSettings(second_order=False))
    exact = sum(made[0].dtype == torch.float32 for made in spill.made if made)
    assert exact >= 3 * len(graph.blocks) - 1  # nothing is lacking before the first


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_stacked_matrices_are_fitted_expert_by_expert(name: str, second_order: bool) -> None:
    dense = build(name).float()
    dense.config._experts_implementation = "grouped_mm"  # in which the matrices are not seen one by one
    graph = discover(dense)
    plan, unseen = half_plan(graph), torch.randint(2, 128, (8, 16), generator=torch.Generator().manual_seed(1))
    plain, restored = copy.deepcopy(dense), copy.deepcopy(dense)
    cut(plain, graph, plan)
    result = reconstruct(Backend(restored, graph), plan, tokens(), ReconstructionSettings(second_order=second_order))
    stacks = {member.tensor for group in graph.groups for member in group.consumers if member.part is not None}
    assert all(0 < result.errors[stack] < 1 for stack in stacks)
    assert restored.config._experts_implementation == "grouped_mm"
    cut(restored, graph, make_plan(graph, result.keep, (), layout=Layout.ADAPTIVE, strategy="test", align=1))
    assert distance(restored, dense, unseen) < distance(plain, dense, unseen)
    assert [p.shape for p in restored.parameters()] == [p.shape for p in plain.parameters()]
    assert second_order == (result.keep != {**result.keep, **plan.keep})


def test_an_expert_is_fitted_on_the_tokens_that_it_gets() -> None:
    model = build("mixtral")
    graph = discover(model)
    (stack,) = stacks_of([group for group in graph.in_block(0) if group.bundle])
    grams, ids = GramMatrices(model, [stack]), tokens(4)
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        seen: list[tuple[torch.Tensor, ...]] = []
        with (
            hooked({experts: lambda module, arguments, output: seen.append(arguments)}),
            grams.observed(held_out=False),
        ):
            model(ids, use_cache=False)
        hidden, chosen, _ = seen[0]
        for place, weight in enumerate(experts.down_proj):
            gate, up = nn.functional.linear(hidden[(chosen == place).any(-1)], experts.gate_up_proj[place]).chunk(2, -1)
            read = (experts.act_fn(gate) * up).float()
            found = grams.moments(stack, place, weight.float(), Processes(), held_out=False)
            torch.testing.assert_close(found.gram, read.T @ read, rtol=1e-4, atol=1e-5)
            assert found.tokens == len(read)
            assert found.error(weight.float()) == pytest.approx(0, abs=1e-5 * found.energy)
            assert grams.moments(stack, place, weight.float(), Processes(), held_out=True).tokens == 0
