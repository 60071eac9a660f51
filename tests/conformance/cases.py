"""What every family must do with its tiny model, each thing done once: cut, mask, save, open, generate."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tests.conformance.every_family import other_buffers
from tests.export.llama import plan_of
from tests.export.test_checkpoint import manifest
from tests.families import FLOAT32, build
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from saap.core.errors import LayoutError
from saap.core.records import CoupledGroup, Layout, ModelGraph, Role, StructurePlan
from saap.discovery import discover
from saap.export.huggingface import CheckpointParts, write_checkpoint
from saap.models.checkpoint.pruned_structure import PrunedStructure
from saap.models.loading.pretrained import load
from saap.models.structure.masking import masked
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
    return model, discover(model, finer_heads=True)


def every_second(group: CoupledGroup) -> tuple[int, ...]:
    return tuple(range(expert_of(group) % 2, group.units, 2)) if group.units > 2 else (group.units - 1,)


def expert_of(group: CoupledGroup) -> int:
    return int(group.name.rpartition(".")[2]) if group.bundle else 0


def mixed(graph: ModelGraph) -> Keep:
    """Another size for every module."""
    keep: Keep = {}
    for group in graph.groups:
        if group.role is Role.QUERY:
            continue  # these leave with their KV groups
        if group.layer == min(one.layer for one in graph.of_role(group.role)) >= 0:
            keep[group.name] = every_second(group)
        elif group.layer > 0 and group.role is Role.FFN:
            keep[group.name] = tuple(range(group.layer, group.units))
    return keep


def query(graph: ModelGraph) -> Keep:
    """Query heads of the first block, in each KV group other ones, and all kinds of units but KV groups in the next."""
    keep: Keep = {}
    for group in graph.of_role(Role.QUERY):
        if group.layer == 0:
            place = int(group.name.rpartition(".")[2]) % 2
            keep[group.name] = tuple(unit for unit in range(group.units) if unit % 2 == place)
    return {**{name: kept for name, kept in mixed(graph).items() if graph.group(name).role is Role.FFN}, **keep}


def whole_ffn(graph: ModelGraph) -> Keep:
    return {group.name: () for group in graph.of_role(Role.FFN) if group.layer == 1}


def whole_attention(graph: ModelGraph) -> Keep:
    return {group.name: tuple(range(group.least)) for group in graph.of_role(Role.ATTENTION) if group.layer == 1}


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
    Case("query heads", query),
    Case("block dropped", mixed, (1,)),
    Case("first block dropped", whole_attention, (0,)),
    Case("width", width),
    Case("width, block dropped, ffn empty", lambda graph: {**width(graph), **whole_ffn(graph)}, (0,)),
)


def plan_for(graph: ModelGraph, case: Case, layout: Layout = Layout.ADAPTIVE) -> StructurePlan:
    return plan_of(graph, case.keep(graph), dropped=case.dropped, layout=layout)


def cut_copy(name: str, case: Case) -> tuple[Any, ModelGraph, StructurePlan, PrunedStructure]:
    model, graph = dense(name)
    plan = plan_for(graph, case)
    pruned = copy.deepcopy(model)
    return pruned, graph, plan, cut(pruned, graph, plan)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits


def difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


def write(model: Any, graph: ModelGraph, plan: StructurePlan, structure: PrunedStructure, out: Path) -> Path:
    """A folder of the cut model in its own type."""
    parts = CheckpointParts(graph=graph, plan=plan, structure=structure, manifest=manifest(plan.layout))
    return write_checkpoint(model, parts, out, dtype=next(model.parameters()).dtype)


def opened(folder: Path) -> Any:
    return plain(load(folder, device="cpu"))


def plain(model: Any) -> Any:
    """The implementations that know float64."""
    model.set_attn_implementation("eager")
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


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
    with masked(reference, graph, plan.keep, plan.dropped_blocks):
        return logits(reference)


def mute_norm(norm: nn.Module, removed: Tensor) -> None:
    """Zero the norm's output on the removed channels, whatever its scale is made of."""
    norm.register_forward_hook(lambda module, arguments, output: output.index_fill(-1, removed, 0.0))


@dataclass(frozen=True)
class Outcome:
    """parameters: predicted, after the cut, after opening. errors: largest difference of logits.

    other_buffers: those that differ in the opened model, the ones that it computes itself included.
    """

    parameters: tuple[int, int, int]
    other_buffers: tuple[str, ...]
    masked_error: float
    saved_error: float
    cached_generation_agrees: bool


def fits(name: str, case: Case) -> bool:
    """Whether the family has what the case prunes."""
    if case.name == "query heads":
        return bool(dense(name)[1].of_role(Role.QUERY))
    return "width" not in case.name or bool(dense(name)[1].of_role(Role.HIDDEN))


def counted(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def adaptive(name: str, case: Case) -> Outcome:
    """Cut, save and open again. Errors are relative to the greatest logit where that is above 1."""
    pruned, graph, plan, structure = cut_copy(name, case)
    before = logits(pruned)
    reference = masked_logits(dense(name)[0], graph, plan)
    with tempfile.TemporaryDirectory() as folder:
        again = opened(write(pruned, graph, plan, structure, Path(folder) / "out"))
    settings = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with_cache = again.generate(IDS, use_cache=True, **settings)
    without = pruned.generate(IDS, use_cache=False, **settings)
    return Outcome(
        (plan.parameters, counted(pruned), counted(again)),
        tuple(other_buffers(pruned, again)),
        difference(before, reference) / max(1.0, float(reference.abs().max())),
        difference(logits(again), before),
        torch.equal(with_cache, without) and with_cache.shape[1] > IDS.shape[1],
    )


def tolerance(name: str, case: Case) -> float:
    """How near masking comes to cutting: norms over what is cut, and parts of some families, are in float32."""
    _, graph = dense(name)
    rounded = any(group.scaled_norms for group in touched(graph, plan_for(graph, case)))
    return ROUNDED if rounded or name in FLOAT32 else EXACT


def uniform_keep(graph: ModelGraph, role: Role) -> Keep:
    """The same number of units in each layer, other units in each."""
    keep: Keep = {}
    for group in graph.of_role(role):
        kept = group.units // 2
        first = (max(0, group.layer) + expert_of(group)) % (group.units - kept + 1)
        keep[group.name] = tuple(range(first, first + kept))
    return keep


def stock_tolerance(role: Role) -> float:
    """How near the stock class comes: norms that compute in float32 round a smaller residual stream otherwise."""
    return ROUNDED if role is Role.HIDDEN else EXACT


@dataclass(frozen=True)
class Stock:
    """A uniform folder as the stock class opens it. refusal: why there is none, then the error is None."""

    refusal: str = ""
    error: float | None = None


@cache
def uniform(name: str, role: Role) -> Stock:
    """Save the family with fewer units of one role for the stock class; all layers keep the same number."""
    model, graph = dense(name)
    keep = uniform_keep(graph, role)
    if not keep:
        return Stock(f"no {role} units can be pruned")
    plan = plan_for(graph, Case("uniform", lambda graph: keep), Layout.UNIFORM)
    pruned = copy.deepcopy(model)
    structure = cut(pruned, graph, plan)
    with tempfile.TemporaryDirectory() as parent:
        out = Path(parent) / "out"
        try:
            folder = write(pruned, graph, plan, structure, out)
        except LayoutError as error:
            assert not out.exists()
            return Stock(str(error))
        assert not list(folder.glob("*.py"))
        stock = plain(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
        assert type(stock) is type(model)
        return Stock(error=difference(logits(stock), logits(pruned)))
