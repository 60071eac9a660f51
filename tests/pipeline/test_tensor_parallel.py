"""Sizes for several devices that share each layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command import run
from tests.pipeline import tiny

import saap
from saap.core.errors import LayoutError, PlanError
from saap.core.records import AxisSlice, Role, Side
from saap.discovery import discover
from saap.discovery.groups import query_members
from saap.models.loading.pretrained import load
from saap.pipeline.shared.legality import require_divisible

SETTINGS: dict[str, Any] = {"num_samples": 4, "sample_length": 32, "refit_tokens": 1024, "align": 8, "effort": "fast"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 96}
    return tiny.folder(tmp_path_factory.mktemp("shared"), layers=4, **sizes)


@pytest.mark.parametrize(("layout", "ratio"), [("adaptive", 0.4), ("uniform", 0.3)])
def test_devices_divide_what_every_layer_keeps(source: Path, tmp_path: Path, layout: str, ratio: float) -> None:
    out = tmp_path / "small"
    settings = {**SETTINGS, "layout": layout, "skip_layers": (0, 0), "strategy": "importance"}
    result = saap.prune(source, pruning_ratio=ratio, out=out, tensor_parallel=3, **settings)
    graph = discover(load(source, device="cpu"))
    kept = {group.name: len(result.plan.kept(group)) for group in graph.groups if group.layer >= 0}
    assert all(kept[group.name] % 24 == 0 for group in graph.of_role(Role.FFN))
    heads = {kept[group.name] for group in graph.of_role(Role.ATTENTION)}
    assert heads <= {3, 6}
    assert sum(kept.values()) < sum(group.units for group in graph.groups if group.layer >= 0)
    settings = json.loads((out / "saap" / "manifest.json").read_text())["settings"]
    assert settings["tensor_parallel"] == 3


def test_a_model_whose_heads_are_not_divisible_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    code, _, error = run(
        capsys, "prune", source, "--pruning-ratio", 0.2, "--tensor-parallel", 4, "--num-samples", 4, "-o", out
    )
    assert code == 2
    assert "--tensor-parallel 4 does not divide the 6 KV groups of layers.0.attention" in error
    assert not out.exists()


def test_kv_groups_that_are_copied_to_the_devices_all_stay(source: Path) -> None:
    settings = {**SETTINGS, "skip_layers": (0, 0), "strategy": "importance", "align": 24}
    result = saap.prune(source, pruning_ratio=0.2, tensor_parallel=12, **settings)
    assert not any("attention" in name for name in result.plan.keep)


def test_query_heads_are_divisible_where_kv_groups_are_copied(source: Path) -> None:
    with pytest.raises(LayoutError, match=r"does not divide the 12 query heads of layers.0.attention"):
        saap.prune(source, pruning_ratio=0.2, tensor_parallel=24, **SETTINGS)
    wide = tiny.model(2, hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    settings = {**SETTINGS, "calibration": torch.randint(2, 300, (96, 64)), "roles": ["query"], "skip_layers": (0, 0)}
    result = saap.prune(wide, pruning_ratio=0.1, tensor_parallel=4, **settings)
    kept = [len(units) for units in result.plan.keep.values()]
    assert kept
    assert all(2 * heads % 4 == 0 for heads in kept)
    graph = discover(tiny.model(2, hidden_size=64, num_attention_heads=8, num_key_value_heads=2), finer_heads=True)
    require_divisible(graph, result.plan.keep, 4)
    with pytest.raises(PlanError, match="keeps 3 units"):
        require_divisible(graph, {graph.of_role(Role.QUERY)[0].name: 3}, 4)


def test_heads_that_share_no_keys_are_told_from_those_of_unknown_width() -> None:
    def heads(*widths: int) -> int:
        sides = [Side.PRODUCER] * (len(widths) - 1) + [Side.CONSUMER]
        sliced = [
            AxisSlice(tensor=f"{n}", axis=0, side=side, offset=0, width=width, stride=width)
            for n, (width, side) in enumerate(zip(widths, sides, strict=True))
        ]
        return query_members(sliced)[1]

    assert heads(8, 8, 8, 8) == 1
    assert heads(32, 8, 8, 32) == 4
    assert heads(192, 256, 128) == 0  # latent attention: query, key and value, output


def test_a_given_plan_is_checked(source: Path, tmp_path: Path) -> None:
    saap.prune(source, pruning_ratio=0.3, out=tmp_path / "one", **SETTINGS)
    plan = tmp_path / "one" / "saap" / "plan.json"
    with pytest.raises(PlanError, match="does not divide"):
        saap.prune(source, plan=plan, out=tmp_path / "two", tensor_parallel=3, **{**SETTINGS, "align": 8})


def test_channels_must_be_divisible_too(source: Path) -> None:
    odd = tiny.model(2, hidden_size=40, num_attention_heads=10, num_key_value_heads=5)
    with pytest.raises(LayoutError, match="does not divide the 96 channels"):
        saap.prune(odd, pruning_ratio=0.2, tensor_parallel=5, calibration=torch.randint(2, 300, (96, 64)), **SETTINGS)
