"""What llama.cpp knows of each model type: facts as data, one entry a type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# llama.cpp's architecture whose heads and FFN channels are counted layer by layer.
PER_LAYER = "deci"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How llama.cpp computes one model type of transformers.

    name: its `general.architecture`. activation: of the FFN, fixed in its code. interleaved: rotary pairs are
    neighbouring rows of a head instead of rows half a head apart. norm_offset: what transformers adds to the weights of
    norms. fits_per_layer: whether a model whose layers differ can be written as `deci`, which is a LLaMA with optional
    biases. window_period: every so many layers one attends to everything, the others to a sliding window; 0: llama.cpp
    has no sliding window here. biases: linear modules that may have one. soft_capped: logits of attention and output
    are capped by the configuration's values. wide_scale_layers: number of layers at which the attention's scale follows
    hidden size / heads, not the head size.
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    norm_offset: float = 0.0
    fits_per_layer: bool = False
    window_period: int = 0
    soft_capped: bool = False
    wide_scale_layers: int = 0
    biases: tuple[str, ...] = ()


_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# `deci` is computed as the LLaMA is, so it has room for the same.
ALL_BIASES = (*_INPUTS, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_GELU = "gelu_pytorch_tanh"
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(name="llama", interleaved=True, fits_per_layer=True, biases=ALL_BIASES),
    "mistral": Architecture(name="llama", interleaved=True, fits_per_layer=True, biases=ALL_BIASES),
    "qwen2": Architecture(name="qwen2", fits_per_layer=True, biases=_INPUTS),
    "qwen3": Architecture(name="qwen3"),
    "gemma": Architecture(name="gemma", activation=_GELU, norm_offset=1.0),
    "gemma2": Architecture(
        name="gemma2",
        activation=_GELU,
        norm_offset=1.0,
        window_period=2,
        soft_capped=True,
        wide_scale_layers=46,
    ),
    "gemma3_text": Architecture(
        name="gemma3", activation=_GELU, norm_offset=1.0, window_period=6, wide_scale_layers=62
    ),
}
