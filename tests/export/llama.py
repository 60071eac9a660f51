"""A tiny LLaMA with its coupled groups written by hand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from saap.core.records import (
    AxisSlice,
    CoupledGroup,
    Layout,
    ModelGraph,
    ModelRef,
    Role,
    Side,
    StructurePlan,
)
from saap.structure_search.plan import make_plan

HIDDEN, LAYERS, KV, REPEAT, HEAD, FFN, VOCABULARY = 24, 3, 2, 2, 8, 40, 64


def tiny_llama(*, tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV * REPEAT,
        num_key_value_heads=KV,
        head_dim=HEAD,
        intermediate_size=FFN,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def llama_graph(model: Any) -> ModelGraph:
    groups: list[CoupledGroup] = []
    hidden = [_out("model.embed_tokens.weight", 1, axis=1), _out("model.norm.weight", 1)]
    if not model.config.tie_word_embeddings:
        hidden.append(_in("lm_head.weight", 1))
    norms = ["model.norm"]
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        heads, ffn = block + "self_attn.", block + "mlp."
        query, key = REPEAT * HEAD, HEAD
        attention = (
            _out(heads + "q_proj.weight", query),
            _out(heads + "k_proj.weight", key),
            _out(heads + "v_proj.weight", key),
            _in(heads + "o_proj.weight", query),
        )
        channels = (
            _out(ffn + "gate_proj.weight", 1),
            _out(ffn + "up_proj.weight", 1),
            _in(ffn + "down_proj.weight", 1),
        )
        groups.append(_group(layer, Role.ATTENTION, KV, attention))
        groups.append(_group(layer, Role.FFN, FFN, channels))
        reading = [heads + name for name in ("q_proj", "k_proj", "v_proj")] + [ffn + "gate_proj", ffn + "up_proj"]
        hidden += [_in(name + ".weight", 1) for name in reading]
        hidden += [_out(name + ".weight", 1) for name in (heads + "o_proj", ffn + "down_proj")]
        own_norms = [block + "input_layernorm", block + "post_attention_layernorm"]
        hidden += [_out(name + ".weight", 1) for name in own_norms]
        norms += own_norms
    width = CoupledGroup(
        layer=-1, role=Role.HIDDEN, name="hidden", units=HIDDEN, members=tuple(hidden), scaled_norms=tuple(norms)
    )
    return ModelGraph(
        model=ModelRef(source="here", config_digest="c", weights_digest="w"),
        blocks=tuple(f"model.layers.{layer}" for layer in range(LAYERS)),
        groups=(*groups, width),
        shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
    )


def plan_of(
    graph: ModelGraph,
    keep: dict[str, tuple[int, ...]],
    *,
    dropped: tuple[int, ...] = (),
    layout: Layout = Layout.ADAPTIVE,
) -> StructurePlan:
    return make_plan(graph, keep, dropped, layout=layout, strategy="by hand", align=1)


def _group(layer: int, role: Role, units: int, members: tuple[AxisSlice, ...]) -> CoupledGroup:
    return CoupledGroup(layer=layer, role=role, name=f"layers.{layer}.{role}", units=units, members=members)


def _out(tensor: str, width: int, axis: int = 0) -> AxisSlice:
    return AxisSlice(tensor=tensor, axis=axis, side=Side.PRODUCER, offset=0, width=width, stride=width)


def _in(tensor: str, width: int) -> AxisSlice:
    return AxisSlice(tensor=tensor, axis=1, side=Side.CONSUMER, offset=0, width=width, stride=width)
