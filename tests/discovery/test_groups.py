"""What the groups of every family contain, and that masking and the recorded attributes agree with the model."""

from __future__ import annotations

import copy
import re
from collections import Counter

import pytest
import torch
import transformers
from packaging.version import Version
from tests.discovery.graphs import graph_of, zeroed
from tests.families import ALL_EXPERTS, EVERY, GROUPED, LAST_EXPERTS, SHARED_EXPERT, VOCABULARY, build, token_ids
from torch import nn

from saap.core.records import ModelGraph, ModelRef, Role, Side
from saap.discovery import discover
from saap.discovery.summary import summarise

# Removal of one KV group: what must follow it, known from the classes' own code.
ATTRIBUTES = {
    "phi3": {"num_key_value_heads": 1, "config.num_attention_heads": 2},
    "gpt2": {"split_size": 8},
    "opt": {"num_heads": 1},
    "opt_projected": {"num_heads": 1},
    "bloom": {"num_heads": 1},
    "falcon": {"num_heads": 2, "num_kv_heads": 1},
    "stablelm": {"num_heads": 2, "num_key_value_heads": 1},
    "mpt": {"n_heads": 1},
    "gpt_neo": {"num_heads": 1},
    "codegen": {"embed_dim": 24},
}
if Version(transformers.__version__) < Version("5.24"):
    ATTRIBUTES["gptj"] = {"num_attention_heads": 1}  # later ones follow the tensors' own sizes
    ATTRIBUTES["codegen"] = {"num_attention_heads": 4}
# ALiBi: a bias with one entry per head comes from outside.
SLICED = {"bloom": "self_attention", "mpt": "attn"}
CENTRED = {"phi", "gpt2", "opt", "bloom", "gpt_neox", "falcon", "falcon_mqa", "starcoder2", "stablelm", "gptj", "mpt"}
CENTRED |= {"opt_projected", "olmo", "cohere", "nemotron", "gpt_bigcode", "gpt_neo", "codegen", "phimoe"}
HEADS = dict.fromkeys(("gpt2", "opt", "bloom", "gpt_neox", "gptj", "mpt", "gpt_neo"), 6)
HEADS |= dict.fromkeys(("deepseek_v3", "deepseek_v3_moe", "deepseek_v2"), 6)
HEADS |= {"opt_projected": 6, "falcon_mqa": 1, "gpt_bigcode": 1}  # all queries share one head of keys and values
HEADS |= {"codegen": 2}  # one of each of the four blocks that it splits its projection into


@pytest.mark.parametrize("family", EVERY)
def test_every_block_has_one_ffn_and_one_attention_group(family: str) -> None:
    graph = graph_of(family)
    last = len(graph.blocks) - 1
    mixtures = range(last + 1) if family in ALL_EXPERTS else [last] if family in LAST_EXPERTS else []
    several = ("ffn.0", "ffn.1") if family in SHARED_EXPERT else ("ffn",)
    parts = {layer: (*several, "expert") if layer in mixtures else ("ffn",) for layer in range(last + 1)}
    names = {f"layers.{layer}.{part}" for layer, here in parts.items() for part in ("attention", *here)}
    assert {group.bundle or group.name for group in graph.groups if group.layer >= 0} == names
    experts = {group.bundle: 0 for group in graph.of_role(Role.FFN) if group.bundle}
    for group in graph.of_role(Role.FFN):
        if group.bundle:
            assert group.name == f"{group.bundle}.expert.{experts[group.bundle]}"
            assert {member.part for member in group.members} == {experts[group.bundle]}
            experts[group.bundle] += 1
    number = 8 if family in GROUPED else 4
    assert set(experts.values()) == ({number} if mixtures else set())
    whole = graph.of_role(Role.EXPERT)
    for layer in range(last + 1):
        assert sum(group.units for group in whole if group.layer == layer) == (number if layer in mixtures else 0)
    assert all(group.least == 2 for group in whole)
    assert {group.units for group in graph.of_role(Role.ATTENTION)} == {HEADS.get(family, 3)}


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("role", [Role.FFN, Role.ATTENTION])
def test_masking_the_consumers_is_masking_the_whole_group(family: str, role: Role) -> None:
    groups = [group for group in graph_of(family).of_role(role) if not group.scaled_norms and group.units > 1]
    model = build(family)
    dense = model(token_ids(), use_cache=False).logits
    whole, consumers = copy.deepcopy(model), copy.deepcopy(model)
    for group in groups:
        zeroed(whole, group, (0,))
        zeroed(consumers, group, (0,), consumers_only=True)
    expected = whole(token_ids(), use_cache=False).logits
    assert torch.allclose(consumers(token_ids(), use_cache=False).logits, expected, rtol=0, atol=1e-10)
    assert not groups or not torch.allclose(dense, expected, atol=1e-3)


@pytest.mark.parametrize("family", EVERY)
def test_the_attributes_that_follow_the_heads_are_found(family: str) -> None:
    for group in graph_of(family).of_role(Role.ATTENTION):
        assert {item.attribute: item.per_unit for item in group.attributes} == ATTRIBUTES.get(family, {})
        sliced = [sliced.module.rpartition(".")[2] for sliced in group.sliced_arguments]
        assert sliced == ([SLICED[family]] if family in SLICED else [])


@pytest.mark.parametrize("family", EVERY)
def test_the_hidden_group_is_complete_or_refused_by_name(family: str) -> None:
    graph = graph_of(family)
    if family in CENTRED:
        assert not graph.of_role(Role.HIDDEN)
        assert [refusal.name for refusal in graph.refused] == ["hidden"]
        assert re.search("^(layer_norm|mean) in .*norm|^layer_norm in .*ln_", graph.refused[0].reason)
        return
    (group,) = graph.of_role(Role.HIDDEN)
    found = Counter((member.tensor, member.axis) for member in group.members)
    model = build(family)
    expected = {
        (name, axis)
        for name, parameter in model.named_parameters()
        for axis, size in enumerate(parameter.shape)
        if size == 48 and not _is_head_axis(name, axis)
    }
    assert set(found) == expected
    assert all(count == 1 for count in found.values())
    weighted = [(path, module) for path, module in model.named_modules() if hasattr(module, "weight")]
    norms = [path for path, module in weighted if "RMSNorm" in type(module).__name__]
    inner = {norm for other in graph.of_role(Role.ATTENTION) for norm in other.scaled_norms}
    narrow = {path for path in norms if model.get_submodule(path).weight.shape != (48,)}
    assert set(group.scaled_norms) == set(norms) - inner - narrow


def _is_head_axis(name: str, axis: int) -> bool:
    """Whether the axis holds heads: where 6 heads of width 8 make 48 channels as well."""
    module = name.split(".")[-2]
    return module == "q_norm" or (module, axis) in {("q_proj", 0), ("o_proj", 1)}


def test_tied_embeddings_are_one_member() -> None:
    graph = graph_of("llama_tied")
    (group,) = graph.of_role(Role.HIDDEN)
    tied = [member for member in group.members if graph.shapes[member.tensor] == (VOCABULARY, 48)]
    assert [(member.tensor, member.side) for member in tied] == [("model.embed_tokens.weight", Side.PRODUCER)]


def test_blocks_of_two_kinds_are_both_found() -> None:
    model = build("gemma2")
    model.model.layers[1].mlp.gate_proj.weight = nn.Parameter(torch.randn(40, 48, dtype=torch.float64))
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.randn(40, 48, dtype=torch.float64))
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.randn(48, 40, dtype=torch.float64))
    graph = discover(model)
    assert [group.units for group in graph.of_role(Role.FFN)] == [80, 40, 80]
    assert len(graph.of_role(Role.HIDDEN)) == 1


def test_discovery_leaves_the_model_as_it_was() -> None:
    model = build("gemma2")
    model.config._attn_implementation = "sdpa"
    model.train()
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    configuration = copy.deepcopy(model.config.to_dict())
    discover(model)
    assert model.config.to_dict() == configuration
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert not calls
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_weights_can_be_discovered() -> None:
    model = build("qwen2").to("meta")
    found = discover(model, ModelRef(source="meta", config_digest="c", weights_digest="w"))
    assert [group.members for group in found.groups] == [group.members for group in graph_of("qwen2").groups]


def test_the_digest_of_a_graph_is_reproducible() -> None:
    assert discover(build("gpt_neox")).digest == graph_of("gpt_neox").digest


def test_summary_has_one_row_for_each_kind_of_group() -> None:
    graph: ModelGraph = graph_of("llama")
    rows = summarise(graph)
    assert [(row["role"], row["groups"], row["units"]) for row in rows] == [
        ("ffn", 3, 80),
        ("attention", 3, 3),
        ("hidden", 1, 48),
    ]
    assert rows[0]["parameters_per_unit"] == 3 * 48
    assert rows[0]["members"][0] == {
        "tensor": "model.layers.*.mlp.gate_proj.weight",
        "axis": 0,
        "side": "producer",
        "width": 1,
        "offset": 0,
    }
    assert len(rows[2]["members"]) == 12
