"""Adaptive folders in vLLM's Transformers backend: the same text and log-probabilities as in transformers."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from harness.experiment import Cells, Measured, Names, Request, Values
from harness.pages import NOTHING
from lab.vllm_runs import compared, vllm_python, worker
from torch import nn

from saap.core.records import CoupledGroup, Layout, ModelGraph, Role
from saap.discovery import discover
from saap.export.huggingface import CheckpointParts, write_checkpoint
from saap.models.loading.pretrained import load
from saap.structure_search.plan import make_plan
from saap.surgery.cut import cut

# vLLM's attention on the CPU has no kernel for the narrow heads of the conformance models.
WIDER = {"hidden_size": 192, "n_embd": 192, "d_model": 192, "head_dim": 32}
OWN: dict[str, dict[str, int]] = {
    "codegen": {"n_embd": 256}, "opt": {"word_embed_proj_dim": 192}, "gemma4": {"global_head_dim": 64},
    "deepseek_v3": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32},
}  # fmt: skip
CELLS = (
    "llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt2", "opt",
    "opt_projected", "bloom", "gpt_neox", "falcon", "falcon_mqa", "olmo2", "granite", "starcoder2", "smollm3",
    "stablelm", "gptj", "glm4", "qwen3_next", "olmo", "cohere", "nemotron", "gpt_bigcode", "gpt_neo", "codegen",
    "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gemma4", "mpt",
)  # fmt: skip
"""The families of the conformance suite."""
HEADS = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
MOST_DIVERGENCE = 1e-4
OPTIONS = {"python": "PATH"}
SMOKE = False
SETTINGS = {"dtype": "float32", "seed": 0}
Keep = Callable[[CoupledGroup, bool], tuple[int, ...] | None]
"""Kept units of a group, given whether it lies in the last layer; None keeps all."""


def fewer_channels(group: CoupledGroup, last: bool) -> tuple[int, ...] | None:
    if group.role is not Role.FFN or group.units < 16:
        return None
    kept = group.units * (5 if last else 3) // 8 // 8 * 8
    return tuple(range(group.layer + 1, group.layer + 1 + kept))


def fewer_heads(group: CoupledGroup, last: bool) -> tuple[int, ...] | None:
    return tuple(unit for unit in range(group.units) if unit != 1) if last and group.role is Role.ATTENTION else None


def fewer_query_heads(group: CoupledGroup, last: bool) -> tuple[int, ...] | None:
    return tuple(range(1, group.units)) if last and group.role is Role.QUERY else None


def no_ffn(group: CoupledGroup, last: bool) -> tuple[int, ...] | None:
    return () if last and group.role is Role.FFN and not group.bundle else None


def no_attention(group: CoupledGroup, last: bool) -> tuple[int, ...] | None:
    return () if last and group.role is Role.ATTENTION else None


def fewer_experts(group: CoupledGroup, last: bool) -> tuple[int, ...] | None:
    return tuple(range(1, group.units)) if group.role is Role.EXPERT else None


EXPERTS = "experts"
KINDS: dict[str, Keep] = {
    "ffn": fewer_channels, "heads": fewer_heads, "query heads": fewer_query_heads, "no ffn": no_ffn,
    "no attention": no_attention, "biases": fewer_channels, EXPERTS: fewer_experts,
}  # fmt: skip
"""What is pruned. biases: each consumer has a bias in addition, as after FLAP. experts: the stock class is written."""
USUAL = ("ffn", "heads", EXPERTS)
ALL_KINDS = ("llama", "qwen3", "opt")
"""Families of which every kind is run: without and with norms of the heads, and with biases and layers in the block."""


def measure(request: Request, wanted: Names) -> Measured:
    """Needs the root of the repository on PYTHONPATH, for the families of the tests."""
    with worker(vllm_python(request)) as runs:
        for family in wanted:
            with tempfile.TemporaryDirectory() as temporary:
                dense, found = dense_folder(Path(temporary) / "dense", family), {}
                for kind in KINDS if family in ALL_KINDS else USUAL:
                    folder = pruned_folder(dense, Path(temporary) / kind, kind)
                    if folder is not None:
                        found[kind] = compared(runs, folder, "vllm" if kind == EXPERTS else "transformers")
                if not agrees(found.get("ffn")):  # whose fault it is
                    found["dense"] = compared(runs, dense)
            yield family, {"versions": runs.versions, "found": found}


def dense_folder(folder: Path, family: str) -> Path:
    """The conformance suite's tiny model of a family with wider heads."""
    families = import_module("tests.families")
    kind, sizes = families.FAMILIES[family]
    sizes = {**sizes, **{name: size for name, size in WIDER.items() if name in sizes}, **OWN.get(family, {})}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**sizes)
    families.randomised(transformers.AutoModelForCausalLM.from_config(config)).float().save_pretrained(folder)
    return folder


def pruned_folder(dense: Path, out: Path, kind: str) -> Path | None:
    """A folder of a kind; None if the family has nothing of it."""
    model = load(dense, device="cpu")
    graph = discover(model, finer_heads=True)
    chosen = {group.name: KINDS[kind](group, group.layer == len(graph.blocks) - 1) for group in graph.groups}
    keep = {name: kept for name, kept in chosen.items() if kept is not None}
    if not keep:
        return None
    layout = Layout.UNIFORM if kind == EXPERTS else Layout.ADAPTIVE
    plan = make_plan(graph, keep, (), layout=layout, strategy="by hand", align=1)
    structure = cut(model, graph, plan)
    if kind == "biases":
        added = tuple(with_biases(model, graph))
        if not added:
            return None
        structure = dataclasses.replace(structure, added_biases=added)
    manifest = import_module("tests.conformance.cases").manifest(plan.layout)
    parts = CheckpointParts(graph=graph, plan=plan, structure=structure, manifest=manifest)
    return write_checkpoint(model, parts, out, dtype=torch.float32)


def with_biases(model: Any, graph: ModelGraph) -> Iterator[str]:
    """Give the consumers inside the blocks a bias; yields the names of those that had none."""
    generator = torch.Generator().manual_seed(0)
    consumers = (member.tensor for group in graph.groups if group.layer >= 0 for member in group.consumers)
    modules = dict(model.named_modules())
    for path in dict.fromkeys(name.removesuffix(".weight") for name in consumers):
        module: Any = modules.get(path)
        if isinstance(module, nn.Linear) and "bias" in module._parameters and module._parameters["bias"] is None:
            module.bias = nn.Parameter(torch.randn(module.out_features, generator=generator) * 0.1)
            yield f"{path}.bias"


def agrees(found: Values | None) -> bool:
    return found is not None and found.get("same") == found.get("prompts", 0) and found["divergence"] < MOST_DIVERGENCE


def summarise(cells: Cells) -> Values:
    rows = {name: cell["found"] for name, cell in cells.items()}
    works = {kind: [name for name, row in rows.items() if agrees(row.get(kind))] for kind in KINDS}
    results = {f"{name} ({kind})": one for name, row in rows.items() for kind, one in row.items()}
    return {
        "rows": {name: {kind: told(row.get(kind)) for kind in works} for name, row in rows.items()},
        "count": {kind: len(names) for kind, names in works.items()}, "experts": works[EXPERTS],
        "families": len(rows), "lost": [name for name, row in rows.items() if agrees(row.get("dense"))],
        "wrong": [name for name, one in results.items() if "same" in one and not agrees(one)],
        "divergence": max(one["divergence"] for one in results.values() if agrees(one)), "most": MOST_DIVERGENCE,
        "heads": [name for name in HEADS if name in works["heads"]], "wanted_heads": len(HEADS),
        "refusals": refusals(results), "versions": next(iter(cells.values()))["versions"],
    }  # fmt: skip


def told(found: Values | None) -> str:
    """A cell of the table."""
    if found is None:
        return NOTHING
    return "refused" if "refused" in found else "same" if agrees(found) else "other"


def refusals(results: Cells) -> dict[str, list[str]]:
    """What vLLM said, with the folders that it refused so."""
    found: dict[str, list[str]] = {}
    for name, one in results.items():
        if "refused" in one:
            found.setdefault(one["refused"], []).append(name)
    return found
