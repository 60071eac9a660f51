"""Properties of llama.cpp's architectures as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Biases = tuple[str, ...]
_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ALL_BIASES = (*_INPUTS, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class PerLayer:
    """An architecture of llama.cpp that reads heads and FFN channels of each layer.

    name, interleaved, biases: as in `Architecture`. fused_inputs: queries, keys and values are one tensor. tied: the
    output always is the embedding. rope_factors: whether frequencies may have factors. skips_attention: a layer may
    have no attention; otherwise a head of zeros stands in. windows: each layer says whether it has a sliding window.
    unscaled: attention is not scaled, so the norm of queries does it. norms: those of the outputs of modules, all by
    their names in the file. value_norm: values are normalised, without a weight. Norms that a family lacks are made the
    identity. fields: further ones with fixed values.
    """

    name: str
    interleaved: bool = False
    biases: Biases = ()
    fused_inputs: bool = False
    tied: bool = False
    rope_factors: bool = True
    skips_attention: bool = False
    windows: bool = False
    unscaled: bool = False
    norms: Mapping[str, str] = field(default_factory=dict)
    value_norm: bool = False
    fields: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """How llama.cpp mixes experts.

    normalised: whether the weights of the chosen experts are divided by their sum; None: as the file says. gating: of
    the router, which the file says too; None: fixed. leading_dense: the first layers may have a plain FFN. interleaved:
    gate and up alternate in transformers' common tensor, and the experts' matrices are transposed.
    """

    normalised: bool | None
    gating: str | None = None
    leading_dense: bool = False
    interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How llama.cpp computes one model type of transformers.

    name: its `general.architecture`. activation: of the FFN, fixed in its code. interleaved: rotary pairs are adjacent
    rows of a head instead of rows half a head apart. norm_offset: constant that transformers adds to norm weights.
    per_layer: architecture that computes the same with sizes of its own in each layer. window_period: one in this many
    layers has full attention, the others a sliding window; 0: no sliding window in llama.cpp. biases: linear modules
    that may have a bias. soft_capped: logits of attention and output are capped by the configuration's values.
    wide_scale_layers: number of layers for which the attention scale follows hidden size / heads instead of the head
    size. partial_rotary: part of a head may be rotated. multi_head: every head has keys and values of its own. latent:
    keys and values come from a latent vector. scales: fields of the file by the constants of the configuration.
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    norm_offset: float = 0.0
    per_layer: PerLayer | None = None
    window_period: int = 0
    soft_capped: bool = False
    wide_scale_layers: int = 0
    biases: Biases = ()
    partial_rotary: bool = False
    multi_head: bool = False
    latent: bool = False
    experts: Experts | None = None
    scales: Mapping[str, str] = field(default_factory=dict)


_DECI = PerLayer(name="deci", interleaved=True, biases=ALL_BIASES, skips_attention=True)
_OPENELM = PerLayer(name="openelm", fused_inputs=True, tied=True, rope_factors=False)
_GEMMA4 = PerLayer(
    name="gemma4", windows=True, unscaled=True, value_norm=True,
    fields={"embedding_length_per_layer_input": 0, "final_logit_softcapping": 0.0},
    norms={
        "attn_q": "attn_q_norm", "attn_k": "attn_k_norm",
        "attn_output": "post_attention_norm", "ffn_down": "post_ffw_norm",
    },
)  # fmt: skip
_GELU = "gelu_pytorch_tanh"
_GRANITE = {
    "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
    "attention_scale": "attention_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
_LLAMA = Architecture(name="llama", interleaved=True, per_layer=_DECI, biases=ALL_BIASES)
_SIGMOID = Experts(normalised=None, gating="SIGMOID", leading_dense=True)
_SOFTMAX = Experts(normalised=False, gating="SOFTMAX", leading_dense=True)
_SUMMED = Experts(normalised=True)
_PLAIN = Experts(normalised=False)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(name="qwen2", per_layer=_DECI, biases=_INPUTS),
    "qwen3": Architecture(name="qwen3", per_layer=_OPENELM),
    "gemma": Architecture(name="gemma", activation=_GELU, norm_offset=1.0, per_layer=_GEMMA4),
    "gemma2": Architecture(
        name="gemma2", activation=_GELU, norm_offset=1.0, window_period=2, soft_capped=True, wide_scale_layers=46
    ),
    "gemma3_text": Architecture(
        name="gemma3", activation=_GELU, norm_offset=1.0, window_period=6, wide_scale_layers=62, per_layer=_GEMMA4
    ),
    "mixtral": Architecture(name="llama", interleaved=True, experts=_SUMMED),
    "qwen2_moe": Architecture(name="qwen2moe", biases=_INPUTS, experts=_PLAIN),
    "qwen3_moe": Architecture(name="qwen3moe", experts=_SUMMED),
    "olmoe": Architecture(name="olmoe", multi_head=True, experts=_PLAIN),
    "granitemoe": Architecture(name="granitemoe", interleaved=True, experts=_SUMMED, scales=_GRANITE),
    "hunyuan_v1_moe": Architecture(name="hunyuan-moe", experts=_SUMMED),
    "glm4_moe": Architecture(name="glm4moe", biases=_INPUTS, partial_rotary=True, experts=_SIGMOID),
    "deepseek_v2": Architecture(name="deepseek2", latent=True, experts=_SOFTMAX),
    "deepseek_v3": Architecture(name="deepseek2", latent=True, experts=_SIGMOID),
    "gpt_oss": Architecture(
        name="gpt-oss", window_period=2, biases=(*_INPUTS, "self_attn.o_proj"),
        experts=Experts(normalised=None, interleaved=True),
    ),
}  # fmt: skip
