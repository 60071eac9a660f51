"""Which configuration fields size what, and which uniform plans a stock configuration can say."""

from __future__ import annotations

import pytest
import torch
from tests.families import build
from torch import nn
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig

from saap.core.errors import LayoutError
from saap.core.records import Layout, ModelGraph, Role, StructurePlan
from saap.discovery import discover
from saap.models.checkpoint.stock_config import keep_layers, uniform_config

FIELDS = {
    "llama": {"intermediate_size": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 1},
    "gpt2": {"n_inner": 1},
    "opt": {"ffn_dim": 1},
    "opt_projected": {"ffn_dim": 1},
    "falcon": {"ffn_hidden_size": 1},
    "bloom": {},
}


def plan_of(graph: ModelGraph, keep: dict[str, tuple[int, ...]]) -> StructurePlan:
    return StructurePlan(
        graph_digest=graph.digest,
        layout=Layout.UNIFORM,
        strategy="test",
        align=1,
        keep=keep,
        parameters=0,
        block_parameters=0,
    )


def keeping(graph: ModelGraph, role: Role, units: tuple[int, ...]) -> StructurePlan:
    return plan_of(graph, {group.name: units for group in graph.of_role(role)})


@pytest.mark.parametrize("family", FIELDS)
def test_the_fields_that_size_each_role_are_found(family: str) -> None:
    graph = discover(build(family))
    assert {field.name: field.per_unit for field in graph.config_fields} == FIELDS[family]
    assert graph.pinned_fields == ({"head_dim": 12} if family == "llama" else {})


def test_a_uniform_plan_becomes_a_configuration() -> None:
    model = build("llama")
    graph = discover(model)
    keep = {group.name: (0, 2) for group in graph.of_role(Role.ATTENTION)}
    keep |= {group.name: tuple(range(64)) for group in graph.of_role(Role.FFN)}
    config = uniform_config(model.config, graph, plan_of(graph, keep))
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, config.head_dim)
    assert sizes == (4, 2, 64, 12)
    assert model.config.num_attention_heads == 6


def test_head_counts_that_the_class_refuses_name_the_nearest_legal_ones() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=6, head_dim=8, intermediate_size=80,
        num_hidden_layers=2, vocab_size=64,
    )  # fmt: skip
    graph = discover(LlamaForCausalLM(config))
    with pytest.raises(LayoutError, match="keep 4 attention units in every layer"):
        uniform_config(config, graph, keeping(graph, Role.ATTENTION, (0, 1, 2, 3, 4)))


def test_layers_of_different_sizes_are_refused() -> None:
    model = build("llama")
    graph = discover(model)
    with pytest.raises(LayoutError, match="different numbers of ffn units: 40 to 80"):
        uniform_config(model.config, graph, plan_of(graph, {"layers.0.ffn": tuple(range(40))}))


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_a_family_without_such_a_field_says_what_it_can_hold(family: str) -> None:
    model = build(family)
    graph = discover(model)
    with pytest.raises(LayoutError, match=r"no configuration for fewer attention units.*--layout adaptive"):
        uniform_config(model.config, graph, keeping(graph, Role.ATTENTION, (0, 1, 2)))


def test_a_model_without_a_configuration_is_refused() -> None:
    graph = discover(build("llama"))
    with pytest.raises(LayoutError, match="no transformers configuration"):
        uniform_config(nn.Linear(1, 1), graph, keeping(graph, Role.FFN, (0,)))


def test_the_last_layer_with_experts_follows_dropped_layers() -> None:
    config = Ernie4_5_MoeConfig(num_hidden_layers=4, moe_layer_start_index=1, moe_layer_end_index=2)
    keep_layers(config, [0, 2, 3], 4)
    assert (config.moe_layer_start_index, config.moe_layer_end_index) == (1, 1)
    config.moe_layer_end_index = -1
    keep_layers(config, [0, 2], 3)
    assert config.moe_layer_end_index == -1
    config = Ernie4_5_MoeConfig(num_hidden_layers=4, moe_layer_start_index=1, moe_layer_end_index=2)
    keep_layers(config, [0, 3], 4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert not [name for name, _ in model.named_parameters() if "experts" in name]
