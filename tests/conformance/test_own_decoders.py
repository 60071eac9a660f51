"""Decoders that no one has listed: found, pruned, restored, saved and opened without a change anywhere."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conformance.cases import (
    CASES,
    EXACT,
    ROUNDED,
    Case,
    counted,
    difference,
    logits,
    masked_logits,
    plan_for,
    write,
)
from tests.conformance.own_decoders import HEAD_WIDTH, VARIANTS, OwnConfig, OwnDecoder
from tests.families import randomised

from saap.core.records import ModelGraph, Role
from saap.discovery import discover
from saap.models.checkpoint.pruned_structure import structure_of
from saap.models.loading.pretrained import load
from saap.models.walk.backend import Backend
from saap.surgery.cut import cut
from saap.surgery.reconstruct import ReconstructionSettings, reconstruct

each_variant = pytest.mark.parametrize("variant", VARIANTS)


@cache
def dense(variant: str) -> tuple[Any, ModelGraph]:
    torch.manual_seed(0)
    model = randomised(OwnDecoder(OwnConfig(**VARIANTS[variant])))
    return model, discover(model)


@each_variant
def test_their_groups_are_found(variant: str) -> None:
    model, graph = dense(variant)
    config = model.config
    assert graph.blocks == tuple(f"wall.{layer}" for layer in range(3))
    assert [group.units for group in graph.of_role(Role.FFN)] == [config.inner] * 3
    assert [group.units for group in graph.of_role(Role.ATTENTION)] == [config.voices] * 3
    places = {(m.tensor, m.offset, m.width, m.stride) for m in graph.group("layers.1.attention").members}
    fused = {place[1:] for place in places if place[0] == "wall.1.ear.tell.weight"}
    whole = config.voices * HEAD_WIDTH
    assert fused == (
        {(0, 2 * HEAD_WIDTH, 2 * HEAD_WIDTH)}
        if config.kv == "interleaved"
        else {(0, HEAD_WIDTH, HEAD_WIDTH), (whole, HEAD_WIDTH, HEAD_WIDTH)}
    )
    soaked = {
        (m.offset, m.width, m.stride)
        for m in graph.group("layers.1.ffn").members
        if m.tensor == "wall.1.sponge.soak.weight"
    }
    assert soaked == ({(0, 1, 1), (config.inner, 1, 1)} if config.gate == "swapped" else {(0, 2, 2)})
    if config.centred:
        assert [refusal.name for refusal in graph.refused] == ["hidden"]
        assert graph.refused[0].reason == "layer_norm in wall.0.before is a statistic over its channels"
    else:
        assert [group.units for group in graph.of_role(Role.HIDDEN)] == [config.width]


@each_variant
@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_cut_saved_and_opened_they_equal_their_masked_selves(variant: str, case: Case, tmp_path: Path) -> None:
    model, graph = dense(variant)
    if "width" in case.name and not graph.of_role(Role.HIDDEN):
        pytest.skip("the hidden width of this decoder is refused")
    plan = plan_for(graph, case)
    pruned = copy.deepcopy(model)
    structure = cut(pruned, graph, plan)
    expected = masked_logits(model, graph, plan)
    tolerance = ROUNDED if "width" in case.name else EXACT
    assert difference(logits(pruned), expected) <= tolerance * max(1.0, float(expected.abs().max()))
    opened = load(write(pruned, graph, plan, structure, tmp_path / "out"), device="cpu")
    assert isinstance(opened, OwnDecoder)
    assert counted(opened) == plan.parameters
    assert difference(logits(opened), logits(pruned)) <= EXACT


@each_variant
@pytest.mark.parametrize("second_order", [False, True])
def test_restored_they_come_nearer_and_open_again(variant: str, second_order: bool, tmp_path: Path) -> None:
    model, graph = dense(variant)
    plan = plan_for(graph, CASES[1])
    only_cut, restored = copy.deepcopy(model), copy.deepcopy(model)
    cut(only_cut, graph, plan)
    tokens = torch.randint(2, model.config.vocab_size, (16, 12), generator=torch.Generator().manual_seed(2))
    result = reconstruct(Backend(restored, graph), plan, tokens, ReconstructionSettings(second_order=second_order))
    assert {path.rpartition(".")[2] for path in result.errors} == {"reply", "wring"}
    chosen = plan_for(graph, Case("restored", lambda _: {name: result.keep[name] for name in plan.keep}))
    cut(restored, graph, chosen)
    dense_logits = logits(model)
    assert (logits(restored) - dense_logits).norm() < (logits(only_cut) - dense_logits).norm()
    structure = structure_of(restored, graph, chosen)
    opened = load(write(restored, graph, chosen, structure, tmp_path / "out"), device="cpu")
    assert difference(logits(opened), logits(restored)) <= EXACT
