"""How a module's output enters the residual stream, and what it should put out to close a gap there."""

from __future__ import annotations

import pytest
import torch
from tests import families
from torch import nn

from saap.discovery import discover
from saap.models.walk.residual import ResidualPath, residual_paths
from saap.models.walk.walker import BlockWalker


def paths_of(name: str) -> tuple[torch.nn.Module, list[ResidualPath]]:
    model = families.build(name)
    graph = discover(model)
    walker = BlockWalker(model, graph.blocks)
    stream = walker.start(families.token_ids(1, 12))
    paths = [m.tensor.rpartition(".")[0] for group in graph.in_block(0) for m in group.consumers]
    with torch.no_grad():
        found = residual_paths(walker, 0, paths, stream.hidden, stream.contexts)
    assert set(found) == set(paths)
    known = [one for one in found.values() if one is not None]
    assert len(known) == len(paths)
    return model, known


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "phi3"])
def test_a_plain_residual_connection_adds_the_output(name: str) -> None:
    _, found = paths_of(name)
    assert [one.gain for one in found] == [pytest.approx(1.0, abs=1e-6)] * 2
    assert [one.norm_path for one in found] == [None, None]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2", "glm4"])
def test_a_norm_in_between_is_found_without_knowing_the_family(name: str) -> None:
    model, found = paths_of(name)
    assert [one.gain for one in found] == [pytest.approx(1.0, abs=1e-4)] * 2
    for one in found:
        assert one.norm_path is not None
        assert "norm" in type(model.get_submodule(one.norm_path)).__name__.lower()


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2"])
def test_the_rounding_of_a_large_stream_hides_nothing(name: str) -> None:
    model = families.build(name).to(torch.bfloat16)
    graph = discover(model)
    walker = BlockWalker(model, graph.blocks)
    stream = walker.start(families.token_ids(1, 12))
    paths = [m.tensor.rpartition(".")[0] for group in graph.in_block(0) for m in group.consumers]
    with torch.no_grad():
        found = residual_paths(walker, 0, paths, 30 * stream.hidden / stream.hidden.std(), stream.contexts)
    assert [one is not None and one.gain for one in found.values()] == [pytest.approx(1.0, abs=1e-2)] * 2


def test_a_token_without_output_asks_for_nothing() -> None:
    model, found = paths_of("gemma2")
    dense = torch.randn(1, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    dense[0, 1] = 0
    entry = found[1].loaded(model, dense)
    with torch.no_grad():
        weights, target = entry.token_weights(dense), entry.target(dense, torch.ones_like(dense))
    assert weights[0, :, 0].tolist()[1] == 0
    assert torch.isfinite(target).all()
    assert torch.equal(target[0, 1], dense[0, 1])


def test_a_scaled_residual_connection_has_its_factor() -> None:
    _, found = paths_of("granite")
    assert all(one.norm_path is None for one in found)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_target_closes_a_small_gap(name: str) -> None:
    model, found = paths_of(name)
    generator = torch.Generator().manual_seed(0)
    width = model.config.hidden_size
    dense = torch.randn(2, 5, width, generator=generator)
    entry = found[1].loaded(model, dense)
    with torch.no_grad():
        gap = 1e-3 * torch.randn(2, 5, width, generator=generator)
        before = entry.added(dense)
        if entry.norm is not None:  # a norm gives every token the same length, so only what turns it can be closed
            direction = before / entry.scale
            lost = (gap / entry.scale * direction).sum(-1, keepdim=True) / direction.square().sum(-1, keepdim=True)
            gap = gap - entry.scale * lost * direction
        closed = entry.added(entry.target(dense, gap)) - before
    assert float((closed - gap).norm()) < 0.02 * float(gap.norm())
    assert bool((entry.token_weights(dense) == 1).all()) == (name == "llama")


@pytest.mark.parametrize("scale", [None, torch.ones(8)])
def test_a_target_keeps_what_the_stream_lacks_beside_a_large_bfloat16_output(scale: torch.Tensor | None) -> None:
    norm = None if scale is None else nn.Identity()
    entry = ResidualPath(1.0, None, norm, scale)
    dense, gap = torch.full((1, 3, 8), 100.0, dtype=torch.bfloat16), torch.full((1, 3, 8), 0.01)
    torch.testing.assert_close(entry.target(dense, gap) - dense.float(), gap, rtol=1e-2, atol=0)
