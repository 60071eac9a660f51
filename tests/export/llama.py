"""A tiny LLaMA, and plans by hand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from saap.core.records import Layout, ModelGraph, StructurePlan
from saap.structure_search.plan import make_plan


def tiny_llama(*, tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=40, vocab_size=64, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def plan_of(
    graph: ModelGraph,
    keep: dict[str, tuple[int, ...]],
    *,
    dropped: tuple[int, ...] = (),
    layout: Layout = Layout.ADAPTIVE,
) -> StructurePlan:
    return make_plan(graph, keep, dropped, layout=layout, strategy="by hand", align=1)
