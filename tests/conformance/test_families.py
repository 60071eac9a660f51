"""Every family: what is cut computes what was masked, and what is saved opens again, as discovery found it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.test_checkpoint import manifest
from tests.families import CORE, FAMILIES, FLOAT32_ATTENTION, build
from torch import Tensor, nn

from saap.discovery import discover
from saap.errors import LayoutError
from saap.export.huggingface import CheckpointParts, write_checkpoint
from saap.models.loading import load
from saap.models.masking import masked
from saap.models.structure import PrunedStructure
from saap.records import CoupledGroup, Layout, ModelGraph, Role, StructurePlan, count_parameters, kept_shapes
from saap.surgery.cut import cut

IDS = torch.arange(3, 27).reshape(2, 12)
EXACT = 1e-10
# Norms of most families compute in float32 whatever the model's dtype.
ROUNDED = 2e-5

Keep = dict[str, tuple[int, ...]]


@cache
def dense(name: str) -> tuple[Any, ModelGraph]:
    """The tiny model as it is once saved and opened, so that its buffers too were made in float64."""
    with tempfile.TemporaryDirectory() as folder:
        build(name).save_pretrained(folder)
        model = opened(Path(folder))
    return model, discover(model)


def group_of(graph: ModelGraph, role: Role, layer: int) -> CoupledGroup:
    return next(group for group in graph.of_role(role) if group.layer == layer)


def every_second(group: CoupledGroup) -> tuple[int, ...]:
    return tuple(range(expert_of(group) % 2, group.units, 2)) if group.units > 2 else (group.units - 1,)


def expert_of(group: CoupledGroup) -> int:
    return int(group.name.rpartition(".")[2]) if group.bundle else 0


def mixed(graph: ModelGraph) -> Keep:
    """Another size for every module."""
    keep: Keep = {}
    for group in graph.groups:
        if group.layer == 0:
            keep[group.name] = every_second(group)
        elif group.layer > 0 and group.role is Role.FFN:
            keep[group.name] = tuple(range(group.layer, group.units))
    return keep


def whole_ffn(graph: ModelGraph) -> Keep:
    return {group.name: () for group in graph.of_role(Role.FFN) if group.layer == 1}


def whole_attention(graph: ModelGraph) -> Keep:
    return {group.name: () for group in graph.of_role(Role.ATTENTION) if group.layer == 1}


def width(graph: ModelGraph) -> Keep:
    return {**mixed(graph), **{group.name: tuple(range(4, group.units)) for group in graph.of_role(Role.HIDDEN)}}


@dataclass(frozen=True)
class Case:
    name: str
    keep: Any
    dropped: tuple[int, ...] = ()


CASES = (
    Case("everything kept", lambda graph: {}),
    Case("mixed", mixed),
    Case("ffn empty", whole_ffn),
    Case("attention empty", whole_attention),
    Case("block dropped", mixed, (1,)),
    Case("first block dropped", whole_attention, (0,)),
    Case("width", width),
    Case("width, block dropped, ffn empty", lambda graph: {**width(graph), **whole_ffn(graph)}, (0,)),
)
each_family = pytest.mark.parametrize("name", FAMILIES)
# The core families in every case, the others in the three that say most.
each_case = pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.name}")
        for name in FAMILIES
        for case in CASES
        if name in CORE or case.name in ("mixed", "attention empty", "width")
    ],
)


def plan_for(graph: ModelGraph, case: Case, layout: Layout = Layout.ADAPTIVE) -> StructurePlan:
    keep = case.keep(graph)
    shapes = kept_shapes(graph, keep, case.dropped)
    return StructurePlan(
        graph_digest=graph.digest,
        layout=layout,
        strategy="by hand",
        align=1,
        keep=keep,
        dropped_blocks=case.dropped,
        parameters=count_parameters(shapes),
        block_parameters=count_parameters({n: s for n, s in shapes.items() if graph.block_of(n) >= 0}),
    )


def cut_copy(name: str, case: Case) -> tuple[Any, ModelGraph, StructurePlan, PrunedStructure]:
    model, graph = dense(name)
    if "width" in case.name and not graph.of_role(Role.HIDDEN):
        pytest.skip("the hidden width of this family is refused")
    plan = plan_for(graph, case)
    pruned = copy.deepcopy(model)
    return pruned, graph, plan, cut(pruned, graph, plan)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits


def difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def write(model: Any, graph: ModelGraph, plan: StructurePlan, structure: PrunedStructure, out: Path) -> Path:
    parts = CheckpointParts(graph=graph, plan=plan, structure=structure, manifest=manifest(plan.layout))
    return write_checkpoint(model, parts, out, dtype=torch.float64).path


def opened(folder: Path) -> Any:
    return plain(load(folder, device="cpu"))


def plain(model: Any) -> Any:
    """The implementations that know float64."""
    model.set_attn_implementation("eager")
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


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
def test_cut_equals_masked_and_has_the_predicted_size(name: str, case: Case) -> None:
    pruned, graph, plan, _ = cut_copy(name, case)
    assert sum(parameter.numel() for parameter in pruned.parameters()) == plan.parameters
    model, _ = dense(name)
    reference = masked_logits(model, graph, plan)
    rounded = name in FLOAT32_ATTENTION or any(group.scaled_norms for group in touched(graph, plan))
    tolerance = ROUNDED if rounded else EXACT
    assert difference(logits(pruned), reference) <= tolerance * max(1.0, float(reference.abs().max()))


def touched(graph: ModelGraph, plan: StructurePlan) -> list[CoupledGroup]:
    return [group for group in graph.groups if len(plan.kept(group)) < group.units]


def masked_logits(model: nn.Module, graph: ModelGraph, plan: StructurePlan) -> Tensor:
    """Logits of the dense model with the removed channels zero where they are consumed.

    Where a norm spans a group's channels it must see the zeros: there the members themselves are zeroed, and what the
    norm gives for the removed channels too.
    """
    reference = copy.deepcopy(model)
    for group in touched(graph, plan):
        if group.scaled_norms:
            removed = sorted(set(range(group.units)) - set(plan.kept(group)))
            for member in group.members:
                index = torch.tensor(member.indices(removed))
                reference.get_parameter(member.tensor).data.index_fill_(member.axis, index, 0.0)
            for path in group.scaled_norms:
                spanned = next(m for m in group.members if m.tensor == f"{path}.weight")
                mute_norm(reference.get_submodule(path), torch.tensor(spanned.indices(removed)))
    with masked(reference, graph, plan):
        return logits(reference)


def mute_norm(norm: nn.Module, removed: Tensor) -> None:
    """Zero the norm's output on the removed channels, whatever its scale is made of."""
    norm.register_forward_hook(lambda module, arguments, output: output.index_fill(-1, removed, 0.0))


@each_case
def test_saved_and_opened_computes_and_generates_the_same(name: str, case: Case, tmp_path: Path) -> None:
    pruned, graph, plan, structure = cut_copy(name, case)
    again = opened(write(pruned, graph, plan, structure, tmp_path / "out"))
    assert difference(logits(again), logits(pruned)) <= EXACT
    assert sum(parameter.numel() for parameter in again.parameters()) == plan.parameters
    settings = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    cached = again.generate(IDS, use_cache=True, **settings)
    assert torch.equal(cached, pruned.generate(IDS, use_cache=False, **settings))
    assert cached.shape[1] > IDS.shape[1]


@each_family
def test_an_opened_model_can_be_saved_again(name: str, tmp_path: Path) -> None:
    pruned, graph, plan, structure = cut_copy(name, CASES[5])
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


def uniform_keep(graph: ModelGraph, role: Role) -> Keep:
    """The same number of units in each layer, other units in each."""
    keep: Keep = {}
    for group in graph.of_role(role):
        kept = group.units // 2
        first = (max(0, group.layer) + expert_of(group)) % (group.units - kept + 1)
        keep[group.name] = tuple(range(first, first + kept))
    return keep


# What a stock configuration must be able to say; for other pairs a refusal is right too.
STOCK = {
    (name, Role.FFN) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox")
}
STOCK |= {(name, Role.FFN) for name in ("mixtral", "qwen3_moe")}
STOCK |= {(name, Role.ATTENTION) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2")}
STOCK |= {(name, Role.HIDDEN) for name in ("llama", "llama_tied", "mistral", "qwen2")}


@each_family
@pytest.mark.parametrize("role", list(Role))
def test_uniform_folders_are_stock_models_or_refused(name: str, role: Role, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, graph = dense(name)
    keep = uniform_keep(graph, role)
    if not keep:
        pytest.skip(f"{role} of this family is refused")
    plan = plan_for(graph, Case("uniform", lambda graph: keep), Layout.UNIFORM)
    pruned = copy.deepcopy(model)
    structure = cut(pruned, graph, plan)
    try:
        folder = write(pruned, graph, plan, structure, tmp_path / "out")
    except LayoutError:
        assert (name, role) not in STOCK
        assert not (tmp_path / "out").exists()
        return
    assert not list(folder.glob("*.py"))
    stock = plain(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    assert type(stock) is type(model)
    assert difference(logits(stock), logits(pruned)) <= EXACT
