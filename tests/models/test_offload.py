from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import families
from tests.pipeline import tiny
from torch import Tensor, nn

from saap.core.records import CalibrationSet, Role
from saap.discovery import discover
from saap.discovery.blocks import find_blocks
from saap.estimation.estimate import estimate
from saap.models.loading.pretrained import load_model, load_offloaded, model_ref
from saap.models.loading.references import resolve_model
from saap.models.walk import offload as offload_module
from saap.models.walk.backend import Backend
from saap.models.walk.offload import OffloadedWeights, mark_changed, offloaded, onload
from saap.models.walk.spill import Spill

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_module, "SMALL_BYTES", 0)


def opened(folder: Path) -> tuple[nn.Module, nn.Module, OffloadedWeights]:
    """The model in memory, the same offloaded, and where its weights are."""
    resolved = resolve_model(folder)
    away = load_offloaded(resolved, find_blocks, device=CPU)
    weights = offloaded(away)
    assert weights is not None
    return load_model(resolved, device=CPU), away, weights


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture
def most_parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Largest number of parts that were in memory whenever one had been read."""
    counts = [0]
    stock = OffloadedWeights.onload

    def counted(self: OffloadedWeights, part: offload_module.Part) -> None:
        stock(self, part)
        counts.append(sum(other.bytes_in_memory > 0 for other in self.parts))

    monkeypatch.setattr(OffloadedWeights, "onload", counted)
    return lambda: max(counts)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen2", "phi3", "opt", "bloom"])
def test_logits_are_those_of_the_model_in_memory(family: str, tmp_path: Path, most_parts: Callable[[], int]) -> None:
    families.build(family).save_pretrained(tmp_path)
    here, away, weights = opened(tmp_path)
    tokens = torch.arange(2, 26).reshape(2, 12)
    for _ in range(2):
        assert torch.equal(logits(away, tokens), logits(here, tokens))
    assert most_parts() == 1
    assert weights.parts_read >= 2 * len(find_blocks(here))
    assert model_ref(away, "x").digest == model_ref(here, "x").digest


def test_a_weight_that_is_away_has_no_value_and_cannot_be_written(tmp_path: Path) -> None:
    tiny.folder(tmp_path)
    here, away, weights = opened(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = away.get_parameter(name)
    assert weight.isnan().all()
    assert weight.shape == here.get_parameter(name).shape
    with pytest.raises(RuntimeError), torch.no_grad():
        weight.copy_(torch.ones_like(weight))
    assert torch.equal(weights.value(weight), here.get_parameter(name))
    onload(away, name)
    assert torch.equal(weight, here.get_parameter(name))


def test_changed_weights_are_written_and_read_again(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model")
    here, away, weights = opened(tmp_path / "model")
    weights.folder, weights.written = tmp_path / "changed", torch.float32
    name = "model.layers.1.mlp.down_proj.weight"
    for model in (here, away):
        onload(model, name)
        with torch.no_grad():
            model.get_parameter(name).mul_(2)
        mark_changed(model, name)
    tokens = torch.arange(2, 14).reshape(1, 12)
    for _ in range(2):
        assert torch.equal(logits(away, tokens), logits(here, tokens))
    assert len(list((tmp_path / "changed").iterdir())) == 1


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "qwen2"])
@pytest.mark.parametrize("roles", [(Role.FFN, Role.ATTENTION), (Role.HIDDEN,)])
def test_scores_are_those_of_the_model_in_memory(
    family: str, roles: tuple[Role, ...], tmp_path: Path, most_parts: Callable[[], int]
) -> None:
    families.build(family).save_pretrained(tmp_path / "model")
    here, away, weights = opened(tmp_path / "model")
    graph = discover(here)
    if not any(group.role in roles for group in graph.groups):
        pytest.skip("no such groups")
    tokens = np.random.default_rng(0).integers(2, 60, (5, 16))
    calibration = CalibrationSet(sources=("random",), seed=0, tokens=tokens)
    before = weights.parts_read
    found = estimate(Backend(away, graph, spill=Spill(tmp_path / "spill")), calibration, roles=roles, micro_batch=2)
    reads = weights.parts_read - before
    expected = estimate(Backend(here, graph), calibration, roles=roles, micro_batch=2)
    assert found.digest == expected.digest
    assert most_parts() == 1
    blocks = len(graph.blocks)
    assert reads < 3 * blocks + 4 * len(weights.parts)  # not once for each micro-batch
    assert not list((tmp_path / "spill").iterdir())


def test_spilled_tensors_come_back(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 4), torch.arange(5), torch.randn(2, 2).bfloat16().T, torch.zeros(0, 3)]
    kept = Spill(tmp_path / "spill").keep(tensors[:2])
    for tensor in tensors[2:]:
        kept.append(tensor)
    assert len(kept) == 4
    for found, tensor in zip(kept, tensors, strict=True):
        assert torch.equal(found, tensor)
        assert found.dtype == tensor.dtype
    del kept
    assert not list((tmp_path / "spill").iterdir())
