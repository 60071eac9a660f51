"""Scores of experts from samples of 16k tokens need neither logits nor matrices of all pairs of tokens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tests import families
from transformers import MixtralConfig, MixtralForCausalLM

from saap.core.records import CalibrationSet, Role
from saap.discovery import discover
from saap.estimation.estimate import estimate
from saap.models.loading import memory
from saap.models.structure import routing
from saap.models.walk.backend import Backend
from saap.models.walk.probe import check_runs
from saap.models.walk.spill import Spill
from saap.models.walk.walker import BlockWalker
from saap.settings.registry import Importance

TOKENS = 16384
VOCABULARY = 20000
MEGABYTE = 10**6


def long_model() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=TOKENS, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
@pytest.mark.parametrize("importance", [Importance.REAP, Importance.RECONSTRUCTION])
def test_memory_is_bounded(importance: Importance, tmp_path: Path) -> None:
    """Logits of one sample are 1.3 GB, its attention matrices 2.1 GB, and what its experts compute at once 130 MB."""
    model = long_model()
    graph, ids = discover(model), torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    cpu, peaks = torch.device("cpu"), []
    for length in (1024, TOKENS):
        text = CalibrationSet(sources=("random",), seed=0, tokens=ids[:, :length].numpy())
        memory.reset_peak(cpu)
        before = memory.of_process()
        estimate(Backend(model, graph, spill=Spill(tmp_path)), text, roles=[Role.EXPERT], importance=importance)
        peaks.append(memory.peak_of_process() - before)
    assert peaks[1] < 80 * MEGABYTE, peaks


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
def test_the_check_of_a_long_sample_makes_no_logits() -> None:
    model = long_model()
    memory.reset_peak(torch.device("cpu"))
    before = memory.of_process()
    check_runs(model, torch.arange(TOKENS)[None] % VOCABULARY)
    assert memory.peak_of_process() - before < 600 * MEGABYTE


@pytest.mark.parametrize("importance", [one for one in Importance if one.of_experts])
def test_pieces_of_a_sample_have_the_scores_of_the_whole(
    importance: Importance, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families.build("qwen3_moe")
    graph = discover(model)
    text = CalibrationSet(sources=("random",), seed=0, tokens=families.token_ids(3, 16).numpy())
    found = []
    for tokens in (10**6, 5):
        monkeypatch.setattr(routing, "TOKENS_AT_ONCE", tokens)
        found.append(estimate(Backend(model, graph), text, roles=[Role.EXPERT], importance=importance))
    assert "forward" not in vars(model.model.layers[0].mlp.experts)
    for name, scores in found[0].groups.items():
        torch.testing.assert_close(torch.from_numpy(found[1].groups[name].element), torch.from_numpy(scores.element))


def test_batches_of_one_shape_share_their_masks() -> None:
    model = families.build("mistral")  # with a sliding window, which needs a mask
    walker = BlockWalker(model, discover(model).blocks)
    streams = [walker.start(families.token_ids(1, length, seed)) for length, seed in ((20, 1), (20, 2), (21, 3))]

    def tensors(stream: object) -> set[int]:
        cells = [cell.cell_contents for call in stream.contexts for cell in call.__closure__]  # type: ignore[attr-defined]
        named = [value for cell in cells if isinstance(cell, dict) for value in cell.values()]
        flat = [one for value in named for one in (value if isinstance(value, tuple) else (value,))]
        return {one.data_ptr() for one in flat if isinstance(one, torch.Tensor)}

    first, second, longer = map(tensors, streams)
    assert first == second
    assert len(first) > 1
    assert not first & longer
    streams.clear()
    assert not walker._shared
