"""Families whose classes do something that others do not: pruned, written and opened, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.conformance.every_family import attempt, build, configuration, prune

import saap
from saap.records import Layout


@pytest.mark.parametrize(
    "family",
    [
        "falcon_h1",  # a buffer that the model computes for its parts, never stored
        "minimax",  # a cache of its own, which transformers tells by the class's name
        "gemma4_text",  # heads of another width in some layers
        "deepseek_v3",  # keys written into an empty tensor, a part of them the same for all heads
        "deepseek_v2",  # the same, with complex rotary embeddings
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
    build(family, **changes).save_pretrained(tmp_path / "dense")
    result = prune(tmp_path / "dense", tmp_path / "out", roles=("block",), skip_layers=(0, 1), pruning_ratio=0.3)
    assert result.plan.dropped_blocks == (0,)
    limits = saap.load(tmp_path / "out").config.time_step_limit
    assert tuple(limits) == tuple(configuration(family).time_step_limit)
