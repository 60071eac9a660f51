"""The fields of a GGUF file for a configuration, and what llama.cpp computes differently."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gguf
import numpy as np

from saap.export.gguf.architectures import Architecture, Experts

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_BETAS = ("beta_fast", "beta_slow")
# Numbers of layers for which llama.cpp takes latent queries as optional.
_PLAIN_QUERIES = (26, 27)
_CLAMPED_GATE = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
WriterFields = list[tuple[Any, ...]]
"""(method of GGUFWriter without its `add_`, its arguments ...), in the order of the file."""


def faults(config: Any, architecture: Architecture, head_size: int) -> list[str]:
    """Differences between the computations of llama.cpp and transformers, in words; empty if there are none."""
    return [
        *_of_activation(config, architecture),
        *_of_attention(config, architecture, head_size),
        *_of_experts(config, architecture),
    ]


def faults_of_depth(config: Any, architecture: Architecture, head_size: int) -> Iterator[str]:
    """Differences in what llama.cpp derives from a layer's place or the number of layers, in words.

    An architecture whose layers say themselves whether they have windows has none of them.
    """
    period = architecture.window_period
    if period and sliding_window(config) is not None:
        kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
        wrong = [index for index, kind in enumerate(kinds) if (kind == _GLOBAL) != ((index + 1) % period == 0)]
        if wrong:
            layers = ", ".join(map(str, wrong[:6]))
            yield f"full attention in other layers than every {period}th (layers {layers})"
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and architecture.norm_offset:
        wide = config.num_hidden_layers == architecture.wide_scale_layers
        expected = config.hidden_size / config.num_attention_heads if wide else head_size
        if scalar != expected:
            yield f"attention scaled by {scalar}^-1/2 (llama.cpp has {expected:g}^-1/2)"


def _of_activation(config: Any, architecture: Architecture) -> Iterator[str]:
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != architecture.activation:
        yield f"the activation {activation!r} (llama.cpp has {architecture.activation!r})"
    gate = tuple(getattr(config, name, value) for name, value in _CLAMPED_GATE.items())
    if gate != tuple(_CLAMPED_GATE.values()):
        yield f"a gate with {', '.join(_CLAMPED_GATE)} {gate} (llama.cpp has {tuple(_CLAMPED_GATE.values())})"


def _of_attention(config: Any, architecture: Architecture, head_size: int) -> Iterator[str]:
    try:
        rope_fields(config, architecture, head_size)
    except ValueError as error:
        yield str(error)
    if architecture.latent and config.q_lora_rank is None and config.num_hidden_layers not in _PLAIN_QUERIES:
        yield f"queries without a latent vector in {config.num_hidden_layers} layers"
    if architecture.multi_head and config.num_key_value_heads != config.num_attention_heads:
        yield f"{config.num_key_value_heads} KV heads for {config.num_attention_heads} heads"
    if getattr(config, "clip_qkv", None) is not None:
        yield "clipped queries, keys and values"
    if not getattr(config, "rope_interleave", True):
        yield "rotary pairs that are half a head apart"


def _of_experts(config: Any, architecture: Architecture) -> Iterator[str]:
    if architecture.experts is None:
        return
    normalised = architecture.experts.normalised
    if normalised is not None and getattr(config, "norm_topk_prob", normalised) != normalised:
        yield f"norm_topk_prob {config.norm_topk_prob} (llama.cpp has {normalised})"
    if architecture.experts.gating != "SIGMOID" and (getattr(config, "n_group", None) or 1) > 1:
        yield f"experts chosen in {config.n_group} groups"


def expert_fields(config: Any, experts: Experts, leading: int, sizes: Mapping[str, int]) -> WriterFields:
    """Fields of a mixture of experts.

    leading: number of first layers with a plain FFN. sizes: number of `experts`, their `channels`, and those of the
    `shared` one, 0 for none.
    """
    chosen = getattr(config, "num_experts_per_tok", None) or config.moe_topk
    fields: WriterFields = [
        ("expert_count", sizes["experts"]),
        ("expert_used_count", chosen if isinstance(chosen, int) else chosen[0]),
        ("expert_feed_forward_length", sizes["channels"]),
    ]
    if sizes["shared"]:
        fields.append(("expert_shared_feed_forward_length", sizes["shared"]))
        fields.append(("expert_shared_count", getattr(config, "n_shared_experts", None) or 1))
    if experts.leading_dense:
        fields.append(("leading_dense_block_count", leading))
    if experts.gating is not None:
        fields.append(("expert_gating_func", gguf.ExpertGatingFuncType[experts.gating]))
        fields.append(("expert_weights_norm", bool(config.norm_topk_prob) and experts.normalised is None))
        fields.append(("expert_weights_scale", float(config.routed_scaling_factor)))
    if (getattr(config, "n_group", None) or 1) > 1:
        fields.append(("expert_group_count", config.n_group))
        fields.append(("expert_group_used_count", config.topk_group))
    return fields


def head_fields(config: Any, architecture: Architecture, head_size: int) -> WriterFields:
    """Sizes of the heads; of a latent attention also the ranks."""
    if not architecture.latent:
        return [("key_length", head_size), ("value_length", head_size)]
    fields: WriterFields = [("key_length", head_size), ("value_length", config.v_head_dim)]
    if config.q_lora_rank is not None:
        fields.append(("q_lora_rank", config.q_lora_rank))
    return [*fields, ("kv_lora_rank", config.kv_lora_rank)]


def sliding_window(config: Any) -> int | None:
    """Size of the sliding window in tokens; None if no layer has one."""
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    return window if kinds is None or _LOCAL in kinds else None


def rope_of_windows(
    config: Any, architecture: Architecture, head_size: int
) -> tuple[WriterFields, tuple[float, ...] | None]:
    """What `rope_fields` returns, for a file whose layers each say whether they have a sliding window.

    There are factors for full attention only, which also express linear scaling. Raises ValueError for other scalings.
    """
    fields, factors = rope_fields(config, architecture, head_size)
    scaling = {name: value for name, value in fields if name.startswith("rope_scaling")}
    if scaling.get("rope_scaling_type", gguf.RopeScalingType.LINEAR) != gguf.RopeScalingType.LINEAR:
        raise ValueError(f"a rotary embedding of type {scaling['rope_scaling_type'].value!r}")
    factors = factors or (scaling.get("rope_scaling_factor", 1.0),) * (head_size // 2)
    window, period = sliding_window(config), architecture.window_period
    local = [bool(period) and (layer + 1) % period != 0 for layer in range(config.num_hidden_layers)]
    if kinds := getattr(config, "layer_types", None):
        local = [kind == _LOCAL for kind in kinds]
    if window is None:  # llama.cpp expects one, so the last layer has a window as long as the context
        if set(factors) != {1.0}:
            raise ValueError("a scaled rotary embedding without a sliding window")
        window, local = int(config.max_position_embeddings), [*[False] * (len(local) - 1), True]
        fields = [*fields, *(("rope_freq_base_swa", value) for name, value in fields if name == "rope_freq_base")]
    kept: WriterFields = [pair for pair in fields if pair[0] not in scaling]
    kept += [
        ("sliding_window", window),
        ("sliding_window_pattern", local),
        ("key_length_swa", head_size),
        ("value_length_swa", head_size),
        ("rope_dimension_count_swa", head_size),
    ]
    return kept, None if all(local) else factors


def rope_fields(
    config: Any, architecture: Architecture, head_size: int
) -> tuple[WriterFields, tuple[float, ...] | None]:
    """Fields of the rotary embedding, and the factors (head size / 2,) of its frequencies, if any.

    Raises ValueError for an embedding that the format cannot express.
    """
    given, local_base = _rope_parameters(config)
    base, kind = float(given["rope_theta"]), given.get("rope_type", given.get("type", "default"))
    part = given.get("partial_rotary_factor", 1.0)
    if part != 1.0 and not architecture.partial_rotary:
        raise ValueError("a rotary embedding of a part of each head")
    rotated = config.qk_rope_head_dim if architecture.latent else int(head_size * part)
    fields: WriterFields = [("rope_dimension_count", rotated), ("rope_freq_base", base)]
    factors = None
    if kind == "llama3":
        factors = llama3_factors(given, base, head_size)
    elif kind in ("linear", "yarn"):
        fields.append(("rope_scaling_type", gguf.RopeScalingType(kind)))
        fields.append(("rope_scaling_factor", float(given["factor"])))
        if kind == "yarn":
            original = given.get("original_max_position_embeddings") or config.max_position_embeddings
            fields.append(("rope_scaling_orig_ctx_len", int(original)))
            fields += [(f"rope_scaling_yarn_{name}", float(given[name])) for name in _BETAS if given.get(name)]
            if architecture.latent and given.get("mscale_all_dim"):
                if given.get("mscale", 1.0) != given["mscale_all_dim"]:
                    raise ValueError("a rotary embedding with mscale and mscale_all_dim that differ")
                # a tenth, as llama.cpp's own converter writes it
                fields.append(("rope_scaling_yarn_log_mul", 0.1 * float(given["mscale_all_dim"])))
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
