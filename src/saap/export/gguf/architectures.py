"""Properties of llama.cpp's architectures as data, and the fields of a file for a configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

# llama.cpp's architecture with per-layer numbers of heads and FFN channels.
PER_LAYER = "deci"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How llama.cpp computes one model type of transformers.

    name: its `general.architecture`. activation: of the FFN, fixed in its code. interleaved: rotary pairs are adjacent
    rows of a head instead of rows half a head apart. norm_offset: constant that transformers adds to norm weights.
    fits_per_layer: whether a model with per-layer sizes can be written as `deci`, a LLaMA with optional biases.
    window_period: one in this many layers has full attention, the others a sliding window; 0: no sliding window in
    llama.cpp. biases: linear modules that may have a bias. soft_capped: logits of attention and output are capped by
    the configuration's values. wide_scale_layers: number of layers for which the attention scale follows hidden size /
    heads instead of the head size.
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
# `deci` is computed like a LLaMA, so it supports the same.
ALL_BIASES = (*_INPUTS, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_GELU = "gelu_pytorch_tanh"
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(name="llama", interleaved=True, fits_per_layer=True, biases=ALL_BIASES),
    "mistral": Architecture(name="llama", interleaved=True, fits_per_layer=True, biases=ALL_BIASES),
    "qwen2": Architecture(name="qwen2", fits_per_layer=True, biases=_INPUTS),
    "qwen3": Architecture(name="qwen3"),
    "gemma": Architecture(name="gemma", activation=_GELU, norm_offset=1.0),
    "gemma2": Architecture(
        name="gemma2", activation=_GELU, norm_offset=1.0, window_period=2, soft_capped=True, wide_scale_layers=46
    ),
    "gemma3_text": Architecture(
        name="gemma3", activation=_GELU, norm_offset=1.0, window_period=6, wide_scale_layers=62
    ),
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
WriterFields = list[tuple[Any, ...]]
"""(method of GGUFWriter without its `add_`, its arguments ...), in the order of the file."""


def faults(config: Any, architecture: Architecture, head_size: int) -> list[str]:
    """Differences between the computations of llama.cpp and transformers, in words; empty if there are none."""
    found = []
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != architecture.activation:
        found.append(f"the activation {activation!r} (llama.cpp has {architecture.activation!r})")
    try:
        rope_fields(config, head_size)
    except ValueError as error:
        found.append(str(error))
    period = architecture.window_period
    if period and sliding_window(config) is not None:
        kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
        wrong = [index for index, kind in enumerate(kinds) if (kind == _GLOBAL) != ((index + 1) % period == 0)]
        if wrong:
            layers = ", ".join(map(str, wrong[:6]))
            found.append(f"full attention in other layers than every {period}th (layers {layers})")
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and architecture.norm_offset:
        wide = config.num_hidden_layers == architecture.wide_scale_layers
        expected = config.hidden_size / config.num_attention_heads if wide else head_size
        if scalar != expected:
            found.append(f"attention scaled by {scalar}^-1/2 (llama.cpp has {expected:g}^-1/2)")
    return found


def sliding_window(config: Any) -> int | None:
    """Size of the sliding window in tokens; None if no layer has one."""
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    return window if kinds is None or _LOCAL in kinds else None


def rope_fields(config: Any, head_size: int) -> tuple[WriterFields, tuple[float, ...] | None]:
    """Fields of the rotary embedding, and the factors (head size / 2,) of its frequencies, if any.

    Raises ValueError for an embedding that the format cannot express.
    """
    given, local_base = _rope_parameters(config)
    base, kind = float(given["rope_theta"]), given.get("rope_type", given.get("type", "default"))
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("a rotary embedding of a part of each head")
    fields: WriterFields = [("rope_dimension_count", head_size), ("rope_freq_base", base)]
    factors = None
    if kind == "llama3":
        factors = llama3_factors(given, base, head_size)
    elif kind in ("linear", "yarn"):
        fields.append(("rope_scaling_type", gguf.RopeScalingType(kind)))
        fields.append(("rope_scaling_factor", float(given["factor"])))
        if kind == "yarn":
            original = given.get("original_max_position_embeddings") or config.max_position_embeddings
            fields.append(("rope_scaling_orig_ctx_len", int(original)))
    elif kind != "default":
        raise ValueError(f"a rotary embedding of type {kind!r}")
    if local_base is not None:
        fields.append(("rope_freq_base_swa", local_base))
    return fields, factors


def _rope_parameters(config: Any) -> tuple[Mapping[str, Any], float | None]:
    """Rotary settings of full-attention layers in any spelling, and the base of sliding-window layers."""
    found: Any = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict):  # transformers 4
        scaling = getattr(config, "rope_scaling", None) or {}
        return {"rope_theta": config.rope_theta, **scaling}, getattr(config, "rope_local_base_freq", None)
    if not any(isinstance(value, dict) for value in found.values()):
        return found, None
    return found.get(_GLOBAL) or found[_LOCAL], (found.get(_LOCAL) or {}).get("rope_theta")


def llama3_factors(given: Mapping[str, Any], base: float, head_size: int) -> tuple[float, ...]:
    """Divisors of LLaMA 3's rotary frequencies: 1 for short waves, `factor` for long ones, interpolated between.

    Returns (head_size / 2,). Source: the configuration of LLaMA 3.1 and its rope_type "llama3" in transformers.
    """
    factor, low, high = (float(given[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(given["original_max_position_embeddings"])
    frequencies = base ** -(np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    turns = context * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple(float(value) for value in 1.0 / ((1 - blend) / factor + blend))
