"""Hand-written graphs of some of the tiny models, so that estimation is tested without discovery."""

from __future__ import annotations

from tests.estimation.tiny import block_paths
from torch import nn

from saap.core.records import AxisSlice, CoupledGroup, ModelGraph, ModelRef, Role, Side

_P, _C = Side.PRODUCER, Side.CONSUMER


def member(
    tensor: str,
    axis: int,
    side: Side,
    width: int = 1,
    offset: int = 0,
    *,
    stride: int = 0,
    period: int = 0,
    jump: int = 0,
) -> AxisSlice:
    return AxisSlice(
        tensor=tensor,
        axis=axis,
        side=side,
        offset=offset,
        width=width,
        stride=stride or width,
        period=period,
        jump=jump,
    )


def _llama(block: str) -> dict[Role, tuple[int, list[AxisSlice]]]:
    attention = [
        member(f"{block}.self_attn.q_proj.weight", 0, _P, 32),
        member(f"{block}.self_attn.k_proj.weight", 0, _P, 16),
        member(f"{block}.self_attn.v_proj.weight", 0, _P, 16),
        member(f"{block}.self_attn.o_proj.weight", 1, _C, 32),
    ]
    ffn = [
        member(f"{block}.mlp.gate_proj.weight", 0, _P),
        member(f"{block}.mlp.up_proj.weight", 0, _P),
        member(f"{block}.mlp.down_proj.weight", 1, _C),
    ]
    return {Role.ATTENTION: (2, attention), Role.FFN: (80, ffn)}


def _qwen2(block: str) -> dict[Role, tuple[int, list[AxisSlice]]]:
    groups = _llama(block)
    attention = [
        member(f"{block}.self_attn.{name}.{kind}", 0, _P, width)
        for name, width in (("q_proj", 24), ("k_proj", 12), ("v_proj", 12))
        for kind in ("weight", "bias")
    ]
    groups[Role.ATTENTION] = (2, [*attention, member(f"{block}.self_attn.o_proj.weight", 1, _C, 24)])
    return groups


def _phi3(block: str) -> dict[Role, tuple[int, list[AxisSlice]]]:
    attention = [
        member(f"{block}.self_attn.qkv_proj.weight", 0, _P, 24),
        member(f"{block}.self_attn.qkv_proj.weight", 0, _P, 12, 48),
        member(f"{block}.self_attn.qkv_proj.weight", 0, _P, 12, 72),
        member(f"{block}.self_attn.o_proj.weight", 1, _C, 24),
    ]
    ffn = [
        member(f"{block}.mlp.gate_up_proj.weight", 0, _P),
        member(f"{block}.mlp.gate_up_proj.weight", 0, _P, 1, 80),
        member(f"{block}.mlp.down_proj.weight", 1, _C),
    ]
    return {Role.ATTENTION: (2, attention), Role.FFN: (80, ffn)}


def _gpt2(block: str) -> dict[Role, tuple[int, list[AxisSlice]]]:
    attention = [
        *(member(f"{block}.attn.c_attn.weight", 1, _P, 12, offset) for offset in (0, 48, 96)),
        *(member(f"{block}.attn.c_attn.bias", 0, _P, 12, offset) for offset in (0, 48, 96)),
        member(f"{block}.attn.c_proj.weight", 0, _C, 12),
    ]
    ffn = [
        member(f"{block}.mlp.c_fc.weight", 1, _P),
        member(f"{block}.mlp.c_fc.bias", 0, _P),
        member(f"{block}.mlp.c_proj.weight", 0, _C),
    ]
    return {Role.ATTENTION: (4, attention), Role.FFN: (80, ffn)}


def _opt(block: str) -> dict[Role, tuple[int, list[AxisSlice]]]:
    attention = [
        member(f"{block}.self_attn.{name}.{kind}", 0, _P, 12)
        for name in ("q_proj", "k_proj", "v_proj")
        for kind in ("weight", "bias")
    ]
    ffn = [
        member(f"{block}.fc1.weight", 0, _P),
        member(f"{block}.fc1.bias", 0, _P),
        member(f"{block}.fc2.weight", 1, _C),
    ]
    return {
        Role.ATTENTION: (4, [*attention, member(f"{block}.self_attn.out_proj.weight", 1, _C, 12)]),
        Role.FFN: (80, ffn),
    }


def _gpt_neox(block: str) -> dict[Role, tuple[int, list[AxisSlice]]]:
    attention = [
        *(
            member(f"{block}.attention.query_key_value.{kind}", 0, _P, 12, offset, stride=36)
            for kind in ("weight", "bias")
            for offset in (0, 12, 24)
        ),
        member(f"{block}.attention.dense.weight", 1, _C, 12),
    ]
    ffn = [
        member(f"{block}.mlp.dense_h_to_4h.weight", 0, _P),
        member(f"{block}.mlp.dense_h_to_4h.bias", 0, _P),
        member(f"{block}.mlp.dense_4h_to_h.weight", 1, _C),
    ]
    return {Role.ATTENTION: (4, attention), Role.FFN: (80, ffn)}


def _own(block: str) -> dict[Role, tuple[int, list[AxisSlice]]]:
    ffn = [
        member(f"{block}.up.weight", 0, _P),
        member(f"{block}.up.bias", 0, _P),
        member(f"{block}.down.weight", 1, _C),
    ]
    return {Role.FFN: (20, ffn)}


_GROUPS = {
    "llama": _llama,
    "qwen2": _qwen2,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "own": _own,
}
KNOWN = tuple(name for name in _GROUPS if name != "own")


def hidden_group(model: nn.Module) -> CoupledGroup:
    """The residual stream of the tiny llama."""
    members = [member("model.embed_tokens.weight", 1, _P), member("model.norm.weight", 0, _P)]
    for block in block_paths(model):
        members += [
            member(f"{block}.self_attn.{name}.weight", axis, side)
            for name, axis, side in (("q_proj", 1, _C), ("k_proj", 1, _C), ("v_proj", 1, _C), ("o_proj", 0, _P))
        ]
        members += [
            member(f"{block}.mlp.{name}.weight", axis, side)
            for name, axis, side in (("gate_proj", 1, _C), ("up_proj", 1, _C), ("down_proj", 0, _P))
        ]
    return CoupledGroup(layer=-1, role=Role.HIDDEN, name="hidden", units=48, members=tuple(members))


def graph_of(family: str, model: nn.Module) -> ModelGraph:
    """The FFN and attention groups of the family's tiny model, and its hidden group if it is a llama."""
    blocks = block_paths(model)
    groups = [
        CoupledGroup(layer=layer, role=role, name=f"layers.{layer}.{role}", units=units, members=tuple(members))
        for layer, block in enumerate(blocks)
        for role, (units, members) in _GROUPS[family](block).items()
    ]
    if family == "llama":
        groups.append(hidden_group(model))
    return ModelGraph(
        model=ModelRef(source=family, config_digest="c", weights_digest="w"),
        blocks=tuple(blocks),
        groups=tuple(groups),
        shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
    )
