"""Models that also read images: their text part is pruned, and the folder opens as the family's own class does."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.llama import plan_of
from tests.export.vision_models import FAMILIES, configuration, folder, inputs
from tests.families import randomised
from transformers import AutoModelForImageTextToText

import saap
from saap.core.errors import ExportError, LayoutError, TargetError
from saap.core.records import Role
from saap.discovery.blocks import find_blocks
from saap.models.loading.pretrained import load
from saap.models.structure.masking import masked
from saap.surgery.cut import cut

SETTINGS: dict[str, Any] = {"samples": 4, "sample_length": 32, "refit_tokens": 1024, "align": 8, "effort": "fast"}


@pytest.fixture(scope="module", params=["llava", "gemma3"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(request.param, tmp_path_factory.mktemp(request.param))


def family_of(source: Path) -> str:
    return next(family for family in FAMILIES if family in source.name)


@torch.no_grad()
def logits(model: Any, family: str) -> torch.Tensor:
    given = inputs(family)
    kind = next(model.parameters()).dtype
    given = {name: value.to(kind) if value.is_floating_point() else value for name, value in given.items()}
    return model(**given, use_cache=False).logits


def same_outside(dense: Any, small: Any) -> bool:
    """Whether what does not belong to the decoder's blocks (images, projector, embeddings) has the same bits."""
    inside = tuple(f"{path}." for path in find_blocks(dense))
    kept = {name: value for name, value in dense.named_parameters() if not name.startswith(inside)}
    assert any("vision" in name or "visual" in name for name in kept)
    found = dict(small.named_parameters())
    return all(torch.equal(value, found[name]) for name, value in kept.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_decoder_computes_with_pixels_what_the_masked_one_does(family: str) -> None:
    torch.manual_seed(0)
    model = randomised(AutoModelForImageTextToText.from_config(configuration(family), attn_implementation="eager"))
    graph = saap.discover(model)
    assert {group.layer for group in graph.of_role(Role.FFN)} == {0, 1, 2}
    assert not graph.of_role(Role.HIDDEN)  # the projector writes into these channels
    assert any(refusal.name == "hidden" and "not used for text" in refusal.reason for refusal in graph.refused)
    assert not any("vision" in path or "visual" in path for path in graph.blocks)
    keep = {
        group.name: tuple(range(group.layer, group.units - 8)) if group.role is Role.FFN else (group.layer % 2,)
        for group in graph.groups
        if group.layer < 2
    }
    plan = plan_of(graph, keep)
    pruned = copy.deepcopy(model)
    cut(pruned, graph, plan)
    with masked(model, graph, plan.keep, plan.dropped_blocks):
        expected = logits(model, family)
    torch.testing.assert_close(logits(pruned, family), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_folder_opens_as_the_stock_class(family: str, tmp_path: Path) -> None:
    source = folder(family, tmp_path / "dense")
    out = tmp_path / "small"
    result = saap.prune(source, pruning_ratio=0.2, layout="uniform", roles=["ffn"], out=out, **SETTINGS)
    stock = AutoModelForImageTextToText.from_pretrained(out)
    assert type(stock).__module__.startswith("transformers.")
    assert not list(out.glob("*.py"))
    assert same_outside(load(source, device="cpu"), stock)
    assert torch.equal(logits(stock, family), logits(result.model, family))


OUTSIDE = """
import sys, torch
from transformers import AutoModelForImageTextToText
assert not any(name.split(".")[0] == "saap" for name in sys.modules)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
given = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(**given, use_cache=False).logits, sys.argv[3])
"""


def test_the_adaptive_folder_opens_with_and_without_saap(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    result = saap.prune(source, pruning_ratio=0.2, out=out, **SETTINGS)
    assert result.plan.block_parameters < 0.8 * 1.01 * result.report.block_parameters_dense
    assert all("vision" not in name for name in result.plan.keep)
    expected = logits(result.model, family_of(source))
    assert torch.equal(logits(load(out, device="cpu"), family_of(source)), expected)
    assert same_outside(load(source, device="cpu"), load(out, device="cpu"))
    assert json.loads((out / "config.json").read_text())["auto_map"]["AutoModelForImageTextToText"]
    assert (out / "processor_config.json").read_bytes() == (source / "processor_config.json").read_bytes()
    usual = "gemma3" in source.name  # its class for images is also the one for text
    name = "AutoModelForCausalLM" if usual else "AutoModelForImageTextToText"
    assert f"from transformers import {name}, AutoTokenizer" in result.report.load_lines
    quick = {"max_steps": 1, "max_seq_length": 32, "batch_size": 4, "validation_samples": 2, "tuning": "full"}
    tuned = saap.recover(out, data=["novels"], out=tmp_path / "tuned", **quick)
    assert [line.replace("tuned", "small") for line in tuned.report.load_lines] == list(result.report.load_lines)
    card = (out / "README.md").read_text()
    assert f"pipeline_tag: {'text-generation' if usual else 'image-text-to-text'}\n" in card
    assert f"model = {name}.from_pretrained(" in card
    load(out, device="cpu").save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", device="cpu"), family_of(source)), expected)
    torch.save(inputs(family_of(source)), tmp_path / "inputs.pt")
    command = [sys.executable, "-c", OUTSIDE, str(out), str(tmp_path / "inputs.pt"), str(tmp_path / "logits.pt")]
    surroundings = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


def test_what_a_configuration_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    source = folder("qwen2_vl", tmp_path / "dense")  # the width of a head follows from hidden size and heads
    with pytest.raises(LayoutError, match=r"qwen2_vl has no configuration for fewer attention.*--layout adaptive"):
        saap.prune(source, pruning_ratio=0.1, layout="uniform", roles=["attention"], out=tmp_path / "no", **SETTINGS)
    with pytest.raises(TargetError, match=r"no hidden groups can be pruned.*not used for text"):
        saap.prune(source, pruning_ratio=0.1, roles=["hidden"], out=tmp_path / "no", **SETTINGS)
    assert not (tmp_path / "no").exists()


def test_gguf_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Models of type (llava|gemma3) cannot be written"):
        saap.export_gguf(source, tmp_path / "out.gguf")
