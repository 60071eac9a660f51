"""Names of published checkpoints, where experts lie one by one: read part by part, and written again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.export.test_gguf_experts import folder_of

import saap
from saap.export.huggingface import stored_entries
from saap.models.checkpoint.published_names import with_published_names
from saap.models.loading.pretrained import load_model, open_skeleton
from saap.models.loading.references import resolve_model

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize("name", FAMILIES)
def test_part_by_part_as_whole(tmp_path: Path, name: str) -> None:
    resolved = resolve_model(folder_of(tmp_path / name, name))
    expected = dict(load_model(resolved, device=torch.device("cpu")).named_parameters())
    _, stored = open_skeleton(resolved, torch.float32)
    assert stored.shapes.keys() >= expected.keys()
    for key, value in expected.items():
        assert stored.shapes[key] == value.shape, key
        assert torch.equal(stored.read(key).float(), value), key


@pytest.mark.parametrize("name", FAMILIES)
def test_written_as_transformers_writes_them(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / name, name)
    model = load_model(resolve_model(folder), device=torch.device("cpu"))
    found = with_published_names(model, stored_entries(model, torch.float32))
    expected = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for key, entry in found.items():
        assert entry.shape == expected[key].shape, key
        for _ in range(2):  # also when it is asked again
            assert torch.equal(entry.make(), expected[key].float()), key


def test_a_pruned_mixture_has_the_published_names(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "dense", "mixtral")
    saap.prune(
        str(folder), output_dir=tmp_path / "pruned", pruning_ratio=0.2, roles=["expert"], layout="uniform",
        importance="reap", restore=False, num_samples=4, sample_length=32, preset="fast",
    )  # fmt: skip
    fields = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert fields["num_experts"] == fields["num_local_experts"] < 4
    names = load_file(tmp_path / "pruned" / "model.safetensors").keys()
    assert names < load_file(folder / "model.safetensors").keys()
    assert not [name for name in names if name.endswith("gate_up_proj")]
