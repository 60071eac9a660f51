"""Every family: what is cut computes what was masked, and what is saved opens again, as discovery found it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tests.conformance.cases import (
    CASES,
    EXACT,
    Case,
    adaptive,
    cut_copy,
    dense,
    difference,
    fits,
    logits,
    opened,
    stock_tolerance,
    tolerance,
    uniform,
    write,
)
from tests.conformance.table import document
from tests.families import ALL_EXPERTS, CORE, EVERY, LAST_EXPERTS

from saap.core.records import Role
from saap.discovery import discover

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
each_family = pytest.mark.parametrize("name", EVERY)
# The core families in every case, the others in the three that say most.
each_case = pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.name}")
        for name in EVERY
        for case in CASES
        if name in CORE or case.name in ("mixed", "attention empty", "query heads", "width")
    ],
)


@pytest.mark.parametrize("name", CORE)
def test_core_families_have_both_groups_in_every_block(name: str) -> None:
    _, graph = dense(name)
    for role in (Role.FFN, Role.ATTENTION):
        assert [group.layer for group in graph.of_role(role)] == list(range(len(graph.blocks)))


@each_family
def test_keeping_everything_leaves_every_bit(name: str) -> None:
    model, _ = dense(name)
    pruned, _, _, structure = cut_copy(name, CASES[0])
    assert structure.is_empty
    state = pruned.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(pruned), logits(model))


@each_case
def test_cut_equals_masked_saves_opens_and_generates_the_same(name: str, case: Case) -> None:
    if not fits(name, case):
        pytest.skip("this family has no such units")
    outcome = adaptive(name, case)
    assert len(set(outcome.parameters)) == 1
    assert not outcome.other_buffers
    assert outcome.masked_error <= tolerance(name, case)
    assert outcome.saved_error <= EXACT
    assert outcome.cached_generation_agrees


@pytest.mark.parametrize("name", ["llama", "bloom", "mpt", "phi3"])
def test_a_pruned_model_can_be_pruned_again(name: str, tmp_path: Path) -> None:
    pruned, graph, plan, structure = cut_copy(name, CASES[1])
    again = discover(opened(write(pruned, graph, plan, structure, tmp_path / "out")))
    left = {group.name for group in graph.groups if plan.kept(group) and group.role is not Role.QUERY}
    assert {group.name for group in again.groups} == left


@each_family
def test_an_opened_model_can_be_saved_again(name: str, tmp_path: Path) -> None:
    pruned, graph, plan, structure = cut_copy(name, CASES[6])
    opened(write(pruned, graph, plan, structure, tmp_path / "out")).save_pretrained(tmp_path / "again")
    assert difference(logits(opened(tmp_path / "again")), logits(pruned)) <= EXACT


REMOTE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "saap" or name.startswith("saap."):
            raise ImportError("saap is not installed here")

sys.meta_path.insert(0, Blocker())
import json, torch
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 27).reshape(2, 12)
results = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float64, attn_implementation="eager", low_cpu_mem_usage=True
    )
    expected = torch.load(folder + ".pt")
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        error = float((model(ids, use_cache=False).logits - expected).abs().max())
    same = bool((model.generate(ids, **settings) == model.generate(ids, use_cache=False, **settings)).all())
    results[folder] = [error, same]
print(json.dumps(results))
"""


def test_folders_open_where_saap_is_not_installed(tmp_path: Path) -> None:
    folders = []
    for name in CORE:
        for index, case in enumerate(CASES[1:5]):
            pruned, graph, plan, structure = cut_copy(name, case)
            folder = write(pruned, graph, plan, structure, tmp_path / f"{name}-{index}")
            torch.save(logits(pruned), f"{folder}.pt")
            folders.append(str(folder))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", REMOTE, *folders]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert sorted(results) == sorted(folders)
    assert all(error <= EXACT and same for error, same in results.values()), results


# What a stock configuration must be able to say; for other pairs a refusal is right too.
STOCK = {
    (name, Role.FFN) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox")
}
STOCK |= {(name, Role.FFN) for name in ("mixtral", "qwen3_moe")}
STOCK |= {(name, Role.EXPERT) for name in (*ALL_EXPERTS, *LAST_EXPERTS)}
STOCK |= {(name, Role.ATTENTION) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2")}
STOCK |= {("deepseek_v3", Role.ATTENTION), ("gemma4", Role.ATTENTION)}
STOCK |= {(name, Role.QUERY) for name in ("llama", "mistral", "qwen3", "gemma2")}
STOCK |= {
    (name, Role.HIDDEN) for name in ("llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
}


@each_family
@pytest.mark.parametrize("role", list(Role))
def test_uniform_folders_are_stock_models_or_refused(name: str, role: Role) -> None:
    if not dense(name)[1].of_role(role):
        pytest.skip(f"{role} of this family is refused")
    found = uniform(name, role)
    if found.error is None:
        assert found.refusal
        assert (name, role) not in STOCK
    else:
        assert found.error <= stock_tolerance(role)


def test_the_page_is_what_the_command_writes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    version = ".".join(transformers.__version__.split(".")[:2])
    if f"with transformers {version};" not in text:
        pytest.skip("the page was made with another version of transformers")
    assert text == document()
    assert "| NO |" not in text
